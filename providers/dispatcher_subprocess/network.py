"""Networks of agents: none, private (outbound through pasta or slirp4netns) or the host's.

A private network's traffic leaves through a process of the host, which can reach everything that the host reaches.
So the agent's network namespace never sends to the denied networks: this host, those that only this host is in
(containers, virtual machines), clouds' metadata and those in the options; nor to multicast and broadcast, where
this host listens, too.  All else goes to the gateway: the kernel's tables of neighbours are one for all
namespaces, and a subnet of an agent's own would fill them.  The agent has no privileges there to change this.
pasta is also bound to the outgoing interface.  It runs in the agent's control group, which counts its sockets.
It would bind the port that an agent sends a datagram from on this host: so with pasta no UDP leaves the namespace.
The rate of new connections is bounded there, too, as each takes an entry of the host's connection tracking.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from dispatcher.plugin import (
    App,
    ConfigError,
    Deadline,
    Network,
    Process,
    ProviderError,
    Unavailable,
    Unsupported,
    denied_networks,
    find_nft,
    find_program,
    process_stat,
    run_command,
)
from dispatcher_subprocess import new_connections
from dispatcher_subprocess.host import LOOPBACK, Host
from dispatcher_subprocess.processes import procfs, run

_INTERFACE = "eth0"  # of an agent, beside the loopback interface
#: Of an agent where it cannot have those of the host: the addresses that slirp4netns gives.
_ADDRESS, _GATEWAY, _MAC = "10.0.2.100", "10.0.2.2", "52:55:0a:00:02:02"
#: Joins control groups before a program runs: a socket is counted where it was made.
_JOIN = """ulimit -n "$1"
while shift && [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit; done
shift; exec "$@" """
#: Descriptors of the process that carries an agent's traffic.  pasta has two for each connection, and raises its
#: limit as far as it may.
_DESCRIPTORS = {"pasta": 4096, "slirp4netns": 1024}

#: Makes the sockets of an agent's name server, and passes them through its standard input.
_NAME_SOCKETS = """
import socket
udp, tcp = (socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
for sock in (udp, tcp):
    sock.bind(("127.0.0.1", 53))
tcp.listen(16)
socket.send_fds(socket.socket(fileno=0), [b"x"], [udp.fileno(), tcp.fileno()])
"""


def verify(app: App, kind: str, host: Host) -> None:
    """Check that an app's network is possible here.

    :param kind: of its endpoint, ``unix`` or ``tcp``.
    :raises ConfigError: not with these options; :raises Unsupported: not on this host.
    """
    if kind == "tcp" and app.network is Network.NONE and host.sandboxed:
        raise no_ports(app)
    if app.network is not Network.PRIVATE:
        return
    if host.private_fault:
        why, fix = host.private_fault
        none = 'network = "none"' if kind == "unix" else 'network = "none" and {socket} in the command'
        raise Unsupported(
            f'apps.{app.name}.network: "private" does not work here',
            why=why,
            fix=f'{fix}; or set {none} for an app that needs no network, network = "host" for one that may reach '
            'this host too, or provider = "docker"',
        )
    if kind == "tcp" and not host.pasta:
        raise Unsupported(
            f'apps.{app.name}.network: {{port}} with network = "private" does not work here',
            why="slirp4netns cannot forward to the loopback interface",
            fix="install passt, or use {socket} in the command",
        )


def no_ports(app: App) -> ConfigError:
    """Return the error of an app that listens on a port in a sandbox without a network."""
    return ConfigError(
        f'apps.{app.name}.network: {{port}} cannot be reached with network = "none"',
        why="a sandbox without a network has no ports",
        fix='use {socket} in the command, or network = "private"',
    )


def resolver() -> bytes:
    """Return a private network's /etc/resolv.conf: the log collector's name server and the host's search list."""
    kept = [
        line
        for line in procfs.read("/etc/resolv.conf").decode("utf-8", "replace").splitlines()
        if line.split(" ")[0] in {"search", "domain", "options"}
    ]
    return "\n".join(["nameserver 127.0.0.1", *kept, ""]).encode()


def name_sockets(host: Host, inner: Process, deadline: Deadline) -> tuple[int, int]:
    """Make the UDP and the TCP socket of a name server in an agent's network namespace.

    :raises ProviderError: that fails; :raises DeadlineExceeded: not in time.
    """
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack, ours, theirs:
        inside = _enter(stack, inner, own_user=not host.privileged)
        _run([*inside.command, sys.executable, "-I", "-S", "-c", _NAME_SOCKETS], inside, theirs.fileno(), deadline)
        ours.setblocking(False)
        _, (udp, tcp), _, _ = socket.recv_fds(ours, 1, 2)
    return udp, tcp


def connect(
    host: Host, inner: Process, port: int, deny: Sequence[str], groups: Sequence[Path], deadline: Deadline
) -> Process:
    """Connect a waiting agent's network namespace with the outside; return the process that carries its traffic.

    :param port: TCP port of the host's loopback interface that leads to the agent, 0 for none.
    :param groups: control groups of that process.
    :raises ProviderError: that fails; :raises DeadlineExceeded: not in time.
    """
    with contextlib.ExitStack() as stack:
        inside = _enter(stack, inner, own_user=not host.privileged)
        most = str(_DESCRIPTORS["pasta" if host.pasta else "slirp4netns"])
        join = ["/bin/sh", "-c", _JOIN, "join", most, *map(str, groups), "--"]
        helper = _pasta(host, inside, port, join, deadline) if host.pasta else _slirp(host, inside, join, deadline)
        try:
            _block(inside, denied_networks(deny), deadline, udp=not host.pasta)
            if host.unbounded is None:
                rules = new_connections.RULES.encode()
                _run([*inside.command, find_nft(), "-f", "-"], inside, rules, deadline)
        except BaseException:
            helper.send(9)
            run.reap(helper)
            raise
    return helper


@dataclass(frozen=True, slots=True)
class _Inside:
    """An agent's namespaces as inherited descriptors."""

    network: int
    user: int | None

    @property
    def command(self) -> list[str]:
        """The beginning of a command that runs there."""
        command = [find_program("nsenter"), f"--net=/proc/self/fd/{self.network}"]
        if self.user is not None:
            command += [f"--user=/proc/self/fd/{self.user}", "--preserve-credentials"]
        return command

    @property
    def fds(self) -> tuple[int, ...]:
        return (self.network,) if self.user is None else (self.network, self.user)


def _enter(stack: contextlib.ExitStack, inner: Process, *, own_user: bool) -> _Inside:
    """Open the namespaces of a waiting agent, and check that it is the process that was started."""
    try:
        network = os.open(f"/proc/{inner.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, network)
        user = procfs.owner(network) if own_user else None
        if user is not None:
            stack.callback(os.close, user)
    except OSError as error:
        raise ProviderError("The sandbox ended before it had a network", why=str(error)) from error
    if not inner.lives:
        raise ProviderError("The sandbox ended before it had a network")
    return _Inside(network, user)


def _pasta(host: Host, inside: _Inside, port: int, join: list[str], deadline: Deadline) -> Process:
    # It closes all inherited descriptors but the standard ones (since August 2024): these are the namespaces.
    with tempfile.NamedTemporaryFile() as pid_file:
        command = [*join, host.pasta, "--quiet", "--config-net", "--no-map-gw", "--ns-ifname", _INTERFACE]
        command += ["--no-ra"]  # each would add a route to the subnet
        # Later versions end when the path of the namespace is gone, and look each second: in the background their
        # standard input is /dev/null.  `Run.kill` ends it with the agent.
        command += ["--no-netns-quit"]
        if host.pasta_loopback:
            command += [LOOPBACK]  # where an app may listen
        command += ["--pid", pid_file.name]
        command += ["-t", f"127.0.0.1/{port}" if port else "none", "-u", "none", "-T", "none", "-U", "none"]
        command += ["--netns", "/proc/self/fd/0"]
        if inside.user is None:
            # It cannot join the namespace as another user, and keeps CAP_SYS_ADMIN for that.
            command += ["--netns-only", "--runas", "0"]
        else:
            command += ["--userns", "/proc/self/fd/1"]
        route = default_route()
        if route:
            command += ["--outbound-if4", route.interface]
            if not route.gateway:  # of a tunnel, and of many rented servers; pasta wants one, and a MAC address
                command += ["--address", _ADDRESS, "--netmask", "24", "--gateway", _GATEWAY, "--mac-addr", _MAC]
        # It goes to the background when the network is ready.
        output = subprocess.DEVNULL if inside.user is None else inside.user
        _run(command, inside, inside.network, deadline, stdout=output)
        try:
            pid = int(pid_file.read())
        except (OSError, ValueError) as error:
            raise ProviderError("pasta did not write its process id", why=str(error)) from error
    found = process_stat(pid)
    if not found:
        raise ProviderError("pasta ended at once", fix="try again")
    return found.process


def _slirp(host: Host, inside: _Inside, join: list[str], deadline: Deadline) -> Process:
    ready, notify = os.pipe()
    try:
        # It confines itself by unmounting a copy of all mounts, and does not care which of them are shared.
        own = [find_program("unshare"), "--mount", "--propagation", "private"] if inside.user is None else []
        command = [*own, *join, host.slirp, "--configure", "--mtu=65520", "--disable-host-loopback"]
        command += ["--enable-sandbox", "--enable-seccomp", f"--ready-fd={notify}", "--netns-type=path"]
        if inside.user is not None:
            command += [f"--userns-path=/proc/self/fd/{inside.user}"]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            helper = run.spawn(
                [*command, f"/proc/self/fd/{inside.network}", _INTERFACE],
                environment={},
                stdin=null,
                output=null,
                inherited=[notify, *inside.fds],
            )
        finally:
            os.close(null)
            os.close(notify)
        if run.wait_readable(ready, deadline) and os.read(ready, 1) == b"1":
            return helper
        helper.send(9)
        run.reap(helper)
        raise ProviderError("slirp4netns does not connect the agent", fix="install passt, which is used instead")
    finally:
        os.close(ready)


def _block(
    inside: _Inside, networks: Sequence[IPv4Network | IPv6Network], deadline: Deadline, *, udp: bool
) -> None:
    """Let nothing but what is for the gateway's side of the world leave the namespace.

    IPv4: An unreachable route is not enough: a socket that names its interface (SO_BINDTODEVICE, IP_UNICAST_IF,
    IP_PKTINFO) passes by it.  A local route of that interface is found in this case, too; 127.0.0.0/8 needs one
    for the same reason.  One for everything, after all other tables, is found with MSG_DONTROUTE, which passes by
    the default route.  Multicast and broadcast look up no route at all with an interface: a policy of IPsec's
    refuses them.  IPv6: rules hold for each socket, while each address of a local route would be a neighbour.

    :param udp: let datagrams pass.
    """
    here = [*_of(4, networks), IPv4Network("127.0.0.0/8")]
    v4 = [
        # Any rule separates the tables, which the kernel searches as one until then: there a more specific route
        # of the host, which newer pasta copies, would be found before a local one.
        "rule add priority 32765 lookup main",
        f"route flush dev {_INTERFACE} table main scope link",
        f"route flush dev {_INTERFACE} table local type broadcast",
        *(f"route append local {one} dev {_INTERFACE} table local metric 9" for one in here),
        f"route append local default dev {_INTERFACE} table default",
        *(f"xfrm policy add dst {one} dir out action block" for one in ("224.0.0.0/4", "255.255.255.255/32")),
    ]
    v6 = [
        f"route flush dev {_INTERFACE} table main proto kernel",
        f"route flush dev {_INTERFACE} table local type multicast",
        *(f"rule add to {one} priority 1 unreachable" for one in (*_of(6, networks), "ff00::/8")),
    ]
    if not udp:
        v4.append("xfrm policy add dst 0.0.0.0/0 proto udp dir out action block")
        v6.append("xfrm policy add dst ::/0 proto udp dir out priority 2 action block")
        v6.append("xfrm policy add dst ::1/128 proto udp dir out priority 1 action allow")
    for version, lines in ((4, v4), (6, v6)) if procfs.read("/proc/net/if_inet6") else ((4, v4),):
        text = "".join(f"{line}\n" for line in lines)
        _run([*inside.command, find_program("ip"), f"-{version}", "-batch", "-"], inside, text.encode(), deadline)


def _of(version: int, networks: Sequence[IPv4Network | IPv6Network]) -> list[IPv4Network | IPv6Network]:
    return [one for one in networks if one.version == version]


def _run(
    command: list[str],
    inside: _Inside,
    stdin: bytes | int,
    deadline: Deadline,
    stdout: int = subprocess.DEVNULL,
) -> None:
    """Run a program.

    :param stdin: its standard input: content, or a descriptor.
    """
    run_command(
        command,
        "Cannot make a private network",
        stdin=stdin,
        stdout=stdout,
        environment={},
        fds=inside.fds,
        deadline=deadline,
    )


@dataclass(frozen=True, slots=True)
class Route:
    """The host's default route for IPv4: its interface, and whether it names a gateway."""

    interface: str
    gateway: bool


def default_route() -> Route | None:
    """Return the host's default route for IPv4, None when there is none."""
    for line in procfs.read("/proc/net/route").decode().splitlines()[1:]:
        fields = line.split()
        if fields[1] == "00000000" and fields[7] == "00000000" and int(fields[3], 16) & 1:
            return Route(fields[0], fields[2] != "00000000")
    return None


def require_route(app: App, host: Host) -> None:
    """Check that the host has a default route, which pasta needs; at boot it may come after the agents.

    :raises Unavailable: it has no default route.
    """
    if app.network is not Network.PRIVATE or not host.pasta or default_route():
        return
    for line in procfs.read("/proc/net/ipv6_route").decode().splitlines():
        fields = line.split()
        if fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo":
            return
    raise Unavailable(
        f'apps.{app.name}.network: "private" needs a network of this host',
        why="it has no default route",
        fix='connect it, or set providers.subprocess.private_network = "slirp4netns", which needs none',
    )
