"""The bridge network that an installation's agents share.

Agents on it cannot reach each other (`enable_icc=false`).  Docker does let containers connect to the host's own
services and to all that the host reaches.  Where the manager is root on the engine's host, firewall rules for the
bridge reject new connections to the host and to the networks of `denied_networks`, clouds' metadata among them.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any

from dispatcher.plugin import Deadline, ProviderContext, ProviderError, denied_networks
from dispatcher_docker.container_config import network_name
from dispatcher_docker.engine import Engine
from dispatcher_docker.errors import NoSuchObject
from dispatcher_docker.options import LABEL

IpNetwork = IPv4Network | IPv6Network

#: Chains that forwarded packets pass before the engine's own; the first exists if the engine manages rules.
_FORWARD = ("DOCKER-USER", "FORWARD")
_RESOLVERS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")


class Networks:
    """Makes and removes the bridge of one installation.

    :param denied: networks that its agents must not reach, besides those of `denied_networks`.
    """

    def __init__(self, engine: Engine, context: ProviderContext, denied: Sequence[str]) -> None:
        self._engine = engine
        self._context = context
        self._denied = denied
        self._lock = threading.Lock()
        self._starting = 0
        self.name = network_name(context.installation)
        #: Name of the bridge's interface, at most 15 characters, and of its chain.
        self.interface = f"dsp-{context.installation}"

    @property
    def can_protect(self) -> bool:
        """Whether the firewall rules can be set here."""
        return self._engine.is_local and self._context.privileged and shutil.which("iptables") is not None

    @contextmanager
    def in_use(self, deadline: Deadline) -> Iterator[None]:
        """Make the bridge and its rules, and keep it for the length of a start."""
        with self._locked(deadline):
            self._protect(self._inspect(deadline) or self._create(deadline), deadline)
            self._starting += 1
        try:
            yield
        finally:
            with self._lock:
                self._starting -= 1

    def protect(self, deadline: Deadline) -> None:
        """Set the rules again if the bridge exists: a reload of the host's firewall removes them."""
        with self._locked(deadline):
            if self.can_protect and (found := self._inspect(deadline)):
                self._protect(found, deadline)

    def _locked(self, deadline: Deadline) -> AbstractContextManager[None]:
        return deadline.holding(
            self._lock,
            "The network of this installation was not ready in time",
            why="another start or removal holds it",
            fix="check whether the engine hangs (docker info)",
        )

    def _inspect(self, deadline: Deadline) -> dict[str, Any]:
        try:
            with self._engine.call("look for the network of this installation", deadline) as client:
                found: dict[str, Any] = client.inspect_network(self.name)
                return found
        except NoSuchObject:
            return {}

    def _create(self, deadline: Deadline) -> dict[str, Any]:
        with self._engine.call("create the network of this installation", deadline) as client:
            client.create_network(
                self.name,
                driver="bridge",
                options={
                    "com.docker.network.bridge.enable_icc": "false",
                    "com.docker.network.bridge.name": self.interface,
                },
                labels={f"{LABEL}installation": self._context.installation},
                check_duplicate=True,
            )
        return self._inspect(deadline)

    def _protect(self, found: dict[str, Any], deadline: Deadline) -> None:
        if not self.can_protect:
            return
        denied = denied_networks(self._denied)
        for version in (4, 6) if found.get("EnableIPv6") else (4,):
            firewall = _Firewall(version, self.interface, deadline)
            firewall.fill([one for one in denied if one.version == version])
            firewall.enter_input()
            firewall.enter(self.interface, *_FORWARD)

    def remove_unused(self, deadline: Deadline) -> None:
        """Remove the bridge and its rules if the installation has no containers left."""
        with self._locked(deadline):
            if self._starting:
                return
            if self._engine.containers(self._context.installation, deadline, all=True, limit=1):
                return
            try:
                with self._engine.call("remove the network of this installation", deadline) as client:
                    client.remove_network(self.name)
            except NoSuchObject:
                return
            if self.can_protect:
                for version in (4, 6):
                    _Firewall(version, self.interface, deadline).clear()


class _Firewall:
    """The rules of one bridge, in a chain that has the name of its interface, for one version of IP."""

    def __init__(self, version: int, interface: str, deadline: Deadline) -> None:
        self._version = version
        self._program = "iptables" if version == 4 else "ip6tables"
        self._interface = interface
        self._input = f"{interface}-in"
        self._deadline = deadline
        self._error = ""

    def fill(self, denied: Sequence[IpNetwork]) -> None:
        """Replace the chains."""
        servers = list(_name_servers())
        own = [one for one in servers if one.version == self._version and not one.is_loopback]
        rules = chain(self._interface, denied, servers) + input_chain(self._input, own)
        if not self._run(f"{self._program}-restore", "--noflush", stdin=rules):
            raise self._failed()

    def enter(self, target: str, *chains: str) -> None:
        """Make new connections from the bridge jump to `target`, in the first of the chains that exists."""
        if not any(self._rule("-C", one, target) or self._rule("-I", one, target) for one in chains):
            raise self._failed()

    def enter_input(self) -> None:
        """Make new connections to this host jump to their chain."""
        self.enter(self._input, "INPUT")
        self._rule("-D", "INPUT", "REJECT")  # of earlier versions: it rejected DNS as well

    def clear(self) -> None:
        """Remove the chains and the jumps to them."""
        for name, chains in ((self._input, ("INPUT",)), (self._interface, _FORWARD)):
            if self._run(self._program, "-F", name):
                for one in chains:
                    self._rule("-D", one, name)
                self._run(self._program, "-X", name)

    def _rule(self, action: str, chain: str, target: str) -> bool:
        match = ["-i", self._interface, "-m", "conntrack", "--ctstate", "NEW,INVALID"]
        return self._run(self._program, action, chain, *match, "-j", target)

    def _run(self, program: str, *arguments: str, stdin: str = "") -> bool:
        seconds = max(0.1, min(10.0, self._deadline.remaining()))
        command = [program, "--wait=5", *arguments]
        try:
            done = subprocess.run(
                command, input=stdin, text=True, capture_output=True, check=False, timeout=seconds
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._error = str(error)
            return False
        self._error = done.stderr.strip()
        return not done.returncode

    def _failed(self) -> ProviderError:
        return ProviderError(
            "This host and the cloud's metadata cannot be protected from agents",
            why=self._error,
            fix='let the manager run iptables, or use network = "none"',
        )


def chain(name: str, denied: Sequence[IpNetwork], servers: Sequence[IPv4Address | IPv6Address]) -> str:
    """Return a chain for iptables-restore: it rejects other agents and denied networks.

    DNS passes to those of the host's name servers that lie in denied networks, as clouds' ones do.
    """
    rules = [
        f"-d {server} -p {protocol} --dport 53 -j RETURN"
        for server in servers
        if any(server in network for network in denied)
        for protocol in ("udp", "tcp")
    ]
    rules += [*(f"-d {network} -j REJECT" for network in denied), f"-o {name} -j REJECT"]
    return "\n".join(["*filter", f":{name} - [0:0]", *(f"-A {name} {rule}" for rule in rules), "COMMIT", ""])


def input_chain(name: str, servers: Sequence[IPv4Address | IPv6Address]) -> str:
    """Return a chain for iptables-restore: of what goes to this host, only DNS to its name servers passes.

    What passes is then up to the host's own rules.
    """
    rules = [
        f"-d {server} -p {protocol} --dport 53 -j RETURN" for server in servers for protocol in ("udp", "tcp")
    ]
    rules.append("-j REJECT")
    return "\n".join(["*filter", f":{name} - [0:0]", *(f"-A {name} {rule}" for rule in rules), "COMMIT", ""])


def _name_servers() -> Iterator[IPv4Address | IPv6Address]:
    """Yield this host's name servers: the engine's own one asks them from inside the container's network."""
    for path in map(Path, _RESOLVERS):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for words in map(str.split, lines):
            if len(words) > 1 and words[0] == "nameserver":
                try:
                    yield ip_address(words[1].partition("%")[0])
                except ValueError:
                    continue
