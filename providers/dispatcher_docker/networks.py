"""The bridge networks of agents: one each, of eight addresses.

On a shared network an agent could get the names of all others from the engine's name server, and fill the kernel's
neighbour table with the addresses of the network.  Agents cannot reach each other's networks.  Docker does let
containers connect to the host's own services and to all that the host reaches.  Where the manager is root on the
engine's host, firewall rules for all bridges of the installation reject new connections to the host and to the
networks of `denied_networks`, clouds' metadata among them, and bound how much of the host's table of tracked
connections an agent takes.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from dispatcher.plugin import (
    MAX_CONNECTIONS,
    NEW_CONNECTIONS,
    NEW_CONNECTIONS_BURST,
    Deadline,
    DispatcherError,
    ProviderContext,
    ProviderError,
    denied_networks,
)
from dispatcher_docker.container_config import network_name
from dispatcher_docker.engine import Engine
from dispatcher_docker.errors import NoSuchObject
from dispatcher_docker.options import LABEL

IpNetwork = IPv4Network | IPv6Network

_BRIDGE = "com.docker.network.bridge.name"
_INTERFACE = f"{LABEL}interface"  # label: a network's bridge, whose name Podman does not tell
_RANGE = f"{LABEL}range"  # label: what a network's subnet is a part of
_PREFIX = 29  # a container, the bridge, and room for an address that the engine has not freed yet
_MOST = 4096  # networks: three digits of an interface's name
_TAKEN = ("overlap", "Overlap", "already used")  # in Docker's and Podman's errors for a subnet
_TRIES = 10  # while other installations take networks at the same time

#: New connections of an agent that are dropped: the table of tracked connections is one for the host and all its
#: containers.  The second match does not count TCP connections that have ended, which stay there for two minutes.
_RATE = f"--hashlimit-above {NEW_CONNECTIONS}/sec --hashlimit-burst {NEW_CONNECTIONS_BURST}"
_BOUNDS = (
    f"-m hashlimit --hashlimit-name {{name}} --hashlimit-mode srcip {_RATE}",
    f"-m connlimit --connlimit-above {MAX_CONNECTIONS} --connlimit-mask {{bits}} --connlimit-saddr",
)

#: Chains that forwarded packets pass before Docker's own; the first exists if Docker manages rules.
_FORWARD = ("DOCKER-USER", "FORWARD")
_RESOLVERS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")


class Networks:
    """Makes and removes the bridges of one installation.

    :param denied: networks that its agents must not reach, besides those of `denied_networks`.
    """

    def __init__(self, engine: Engine, context: ProviderContext, denied: Sequence[str]) -> None:
        self._engine = engine
        self._context = context
        self._denied = denied
        self._lock = threading.Lock()
        #: Beginning of the names of the bridges' interfaces, which have at most 15 characters, and of the chains.
        self.interface = f"dsp-{context.installation}"
        self._probe = f"{network_name(context.installation)}-range"  # exists for a moment; longer after a crash

    @property
    def can_protect(self) -> bool:
        """Whether the firewall rules can be set here."""
        return self._engine.is_local and self._context.privileged and shutil.which("iptables") is not None

    def bounds(self, deadline: Deadline) -> bool:
        """Whether the kernel has what bounds the number of an agent's connections."""
        return self.can_protect and self._firewall(4, deadline).can_bound()

    def _firewall(self, version: int, deadline: Deadline) -> _Firewall:
        return _Firewall(version, self.interface, deadline, early=self._engine.is_podman)

    @contextmanager
    def in_use(self, name: str, deadline: Deadline) -> Iterator[None]:
        """Make the bridge of an agent and the rules; remove it if the block, which starts the agent, fails.

        :param name: of the agent's container, and of its network.
        """
        with self._locked(deadline):
            ours = self._ours(deadline)
            if name not in ours:
                ours[name] = self._create(name, ours, deadline)
            self._protect(ours, deadline)
        try:
            yield
        except BaseException:
            with contextlib.suppress(DispatcherError):
                self.remove(name, Deadline(10))
            raise

    def protect(self, deadline: Deadline) -> None:
        """Set the rules again if there are bridges: a reload of the host's firewall removes them."""
        with self._locked(deadline):
            if self.can_protect and (ours := self._ours(deadline)):
                self._protect(ours, deadline)

    def remove(self, name: str, deadline: Deadline) -> None:
        """Remove the bridge of an agent, if there is one, and the rules with the last bridge."""
        with self._locked(deadline):
            ours = self._ours(deadline)
            if ours.pop(name, None) is None:
                return
            self._delete(name, deadline)
            if ours:
                return
            self._delete(self._probe, deadline)
            for version in (4, 6) if self.can_protect else ():
                self._firewall(version, deadline).clear()

    def _locked(self, deadline: Deadline) -> AbstractContextManager[None]:
        return deadline.holding(
            self._lock,
            "The agent's network was not ready in time",
            why="another start or removal is changing the networks of this installation",
            fix="check whether the engine hangs (docker info)",
        )

    def _ours(self, deadline: Deadline) -> dict[str, dict[str, Any]]:
        """Return this installation's networks by name."""
        label = f"{LABEL}installation={self._context.installation}"
        with self._engine.call("list the networks of this installation", deadline) as client:
            found = client.networks(filters={"label": label})
        return {one["Name"]: one for one in found if one["Name"] != self._probe}

    def _create(self, name: str, ours: Mapping[str, dict[str, Any]], deadline: Deadline) -> dict[str, Any]:
        interfaces = {(one.get("Labels") or {}).get(_INTERFACE) for one in ours.values()}
        interfaces |= {(one.get("Options") or {}).get(_BRIDGE) for one in ours.values()}
        names = (f"{self.interface}{number:03x}" for number in range(_MOST))
        interface = next((one for one in names if one not in interfaces), None)
        if interface is None:
            raise ProviderError(
                f"There are {_MOST} agents with private networks", why="an installation takes no more"
            )
        ranges = dict.fromkeys(
            ip_network(text) for one in ours.values() if (text := (one.get("Labels") or {}).get(_RANGE))
        )
        taken = {ip_network(text) for one in ours.values() for text in _subnets(one)}
        for attempt in range(_TRIES):
            found = _free(ranges, taken)
            if found is None:
                ranges = {self._new_range(deadline): None}
                found = _free(ranges, taken)
            try:
                return self._make(name, interface, found, deadline)
            except ProviderError as error:
                if found is None or attempt == _TRIES - 1 or not any(words in error.why for words in _TAKEN):
                    raise
                taken.add(found[1])
        raise AssertionError("unreachable")

    def _new_range(self, deadline: Deadline) -> IpNetwork:
        """Return a range of addresses that the engine would give to a network: one that this host does not use."""
        self._delete(self._probe, deadline)
        made = self._make(self._probe, f"{self.interface}new", None, deadline)
        self._delete(self._probe, deadline)
        return ip_network(next(text for text in _subnets(made) if ":" not in text))

    def _make(
        self, name: str, interface: str, place: tuple[IpNetwork, IpNetwork] | None, deadline: Deadline
    ) -> dict[str, Any]:
        """Make a network.

        :param place: its range and its subnet; None: the engine chooses.
        """
        labels = {f"{LABEL}installation": self._context.installation, _INTERFACE: interface}
        ipam: Any = None
        if place:
            labels[_RANGE] = str(place[0])
            ipam = {"Driver": "default", "Config": [{"Subnet": str(place[1])}]}
        options = {_BRIDGE: interface}
        with self._engine.call("create the agent's network", deadline) as client:
            client.create_network(
                name, driver="bridge", options=options, labels=labels, ipam=ipam, check_duplicate=True
            )
            made: dict[str, Any] = client.inspect_network(name)
            return made

    def _delete(self, name: str, deadline: Deadline) -> None:
        try:
            with self._engine.call("remove the agent's network", deadline) as client:
                client.remove_network(name)
        except NoSuchObject:
            pass

    def _protect(self, ours: Mapping[str, dict[str, Any]], deadline: Deadline) -> None:
        if not self.can_protect:
            return
        denied = denied_networks(self._denied)
        for version in (4, 6) if any(one.get("EnableIPv6") for one in ours.values()) else (4,):
            firewall = self._firewall(version, deadline)
            firewall.bound()
            firewall.fill([one for one in denied if one.version == version])
            firewall.enter_input()
            firewall.enter_forward()


def _free(ranges: Iterable[IpNetwork], taken: Container[IpNetwork]) -> tuple[IpNetwork, IpNetwork] | None:
    """Return the first small network that is free, after its range; None if there is none."""
    for one in ranges:
        for subnet in one.subnets(new_prefix=max(_PREFIX, one.prefixlen)):
            if subnet not in taken:
                return one, subnet
    return None


def _subnets(network: Mapping[str, Any]) -> list[str]:
    """Return the subnets of a network as the engine describes it."""
    return [one["Subnet"] for one in (network.get("IPAM") or {}).get("Config") or () if one.get("Subnet")]


class _Firewall:
    """The rules of an installation's bridges for one version of IP.

    :param interface: the beginning of their names, and the name of the chain.
    :param early: forwarded packets are judged in the table `mangle`, before the rules of the table `filter`, the
        first of which accepts them (Podman's netavark).  Denied ones are dropped: `mangle` cannot reject.
    """

    def __init__(self, version: int, interface: str, deadline: Deadline, *, early: bool = False) -> None:
        self._version = version
        self._table = "mangle" if early else "filter"
        self._forward: tuple[str, ...] = ("FORWARD",) if early else _FORWARD
        self._tables = dict.fromkeys(("filter", self._table))
        self._program = "iptables" if version == 4 else "ip6tables"
        self._interface = interface
        self._input = f"{interface}-in"
        self._bounds = f"{interface}-new"
        self._deadline = deadline
        self._error = ""

    def bound(self) -> None:
        """Make the chain that bounds each agent's connections; empty if the kernel cannot.

        A new rule would begin to count at 0, so a chain that is complete stays.
        """
        rules = self._bound_rules()
        for table in self._tables:
            if not all(self._iptables(table, "-C", self._bounds, *rule.split()) for rule in rules):
                self._restore(restored(self._bounds, rules, table)) or self._restore(
                    restored(self._bounds, (), table)
                )

    def can_bound(self) -> bool:
        """Whether the kernel takes the rules of `bound`."""
        name = f"{self._interface}-try"
        done = self._restore(restored(name, self._bound_rules()))
        self._iptables("filter", "-F", name)
        self._iptables("filter", "-X", name)
        return done

    def _bound_rules(self) -> list[str]:
        bits = 32 if self._version == 4 else 128
        return [f"{match.format(name=self._interface, bits=bits)} -j DROP" for match in _BOUNDS]

    def _restore(self, rules: str) -> bool:
        return self._run(f"{self._program}-restore", "--noflush", stdin=rules)

    def fill(self, denied: Sequence[IpNetwork]) -> None:
        """Replace the chains."""
        servers = list(_name_servers())
        own = [one for one in servers if one.version == self._version and not one.is_loopback]
        rules = chain(self._interface, denied, servers, first=self._bounds, table=self._table)
        if not self._restore(rules + input_chain(self._input, own, first=self._bounds)):
            raise self._failed()

    def enter_forward(self) -> None:
        """Make new connections to other hosts jump to their chain."""
        chains = self._forward
        if chains is _FORWARD and not self._iptables("filter", "-C", "FORWARD", "-j", _FORWARD[0]):
            chains = _FORWARD[1:]  # a firewall that was restored may have the first without a jump to it
        self._enter(self._table, self._interface, chains)

    def enter_input(self) -> None:
        """Make new connections to this host jump to their chain."""
        self._enter("filter", self._input, ("INPUT",))

    def _enter(self, table: str, target: str, chains: Iterable[str]) -> None:
        """Make new connections from the bridges jump to `target`, in the first of the chains that exists."""
        if not any(self._rule(table, "-C", one, target) or self._rule(table, "-I", one, target) for one in chains):
            raise self._failed()

    def clear(self) -> None:
        """Remove the chains and the jumps to them."""
        jumps = [("filter", self._input, ("INPUT",)), (self._table, self._interface, self._forward)]
        for table, name, chains in [*jumps, *((one, self._bounds, ()) for one in self._tables)]:
            if self._iptables(table, "-F", name):
                for one in chains:
                    self._rule(table, "-D", one, name)
                self._iptables(table, "-X", name)

    def _rule(self, table: str, action: str, chain: str, target: str) -> bool:
        match = ["-i", f"{self._interface}+", "-m", "conntrack", "--ctstate", "NEW,INVALID"]
        return self._iptables(table, action, chain, *match, "-j", target)

    def _iptables(self, table: str, *arguments: str) -> bool:
        return self._run(self._program, "-t", table, *arguments)

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


def restored(name: str, rules: Iterable[str], table: str = "filter") -> str:
    """Return a chain for iptables-restore."""
    return "\n".join([f"*{table}", f":{name} - [0:0]", *(f"-A {name} {rule}" for rule in rules), "COMMIT", ""])


def chain(
    name: str,
    denied: Sequence[IpNetwork],
    servers: Sequence[IPv4Address | IPv6Address],
    *,
    first: str,
    table: str = "filter",
) -> str:
    """Return a chain for iptables-restore: it refuses other agents and denied networks.

    DNS passes to those of the host's name servers that lie in denied networks, as clouds' ones do.

    :param first: the chain that new connections pass before.
    """
    rules = [f"-j {first}"]
    rules += [
        f"-d {server} -p {protocol} --dport 53 -j RETURN"
        for server in servers
        if any(server in network for network in denied)
        for protocol in ("udp", "tcp")
    ]
    refuse = "REJECT" if table == "filter" else "DROP"
    rules += [f"-d {network} -j {refuse}" for network in denied]
    return restored(name, [*rules, f"-o {name}+ -j {refuse}"], table)


def input_chain(name: str, servers: Sequence[IPv4Address | IPv6Address], *, first: str) -> str:
    """Return a chain for iptables-restore: of what goes to this host, only DNS to its name servers passes.

    What passes is then up to the host's own rules.
    """
    dns = [f"-d {server} -p {protocol} --dport 53 -j RETURN" for server in servers for protocol in ("udp", "tcp")]
    return restored(name, [f"-j {first}", *dns, "-j REJECT"])


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
