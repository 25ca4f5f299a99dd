"""What an agent with ``network = "private"`` must not reach, and where an agent listens."""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable
from ipaddress import (
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path

from dispatcher.plugin.model import Endpoint

_LISTEN = "0A"  # state in /proc/net/tcp
_ACCEPTS = 0x10000  # flag of a listening socket in /proc/net/unix
IpNetwork = IPv4Network | IPv6Network

#: Clouds' metadata services, which give the machine's credentials to any process on it, and link-local networks.
METADATA_NETWORKS: tuple[IpNetwork, ...] = tuple(
    ip_network(text)
    for text in (
        "169.254.0.0/16",  # AWS, Azure, Google, OpenStack, Oracle, ...
        "168.63.129.16/32",  # Azure
        "100.100.100.200/32",  # Alibaba
        "192.0.0.192/32",  # Oracle
        "fd00:ec2::/64",  # AWS
        "fd20:ce::254/128",  # Google
        "fd00:42::42/128",  # Scaleway
        "fe80::a9fe:a9fe/128",  # OpenStack; named alone, as a route to fe80::/64 is narrower than the next one
        "fe80::/10",
        "2002::/16",  # 6to4, and NAT64 with a prefix of the site's own: IPv4 addresses are in these
        "64:ff9b:1::/48",
    )
)
_NAT64 = ip_network("64:ff9b::/96")  # leads to all of IPv4, so it is denied as far as IPv4 is
_NEIGHBOURS = 1024  # of all network namespaces together, by the kernel's defaults (gc_thresh3)


def denied_networks(extra: Iterable[str] = (), proc: Path = Path("/proc")) -> list[IpNetwork]:
    """Return `METADATA_NETWORKS`, this host's addresses, the networks that only this host is in, and `extra`.

    An interface with a default route leads outside: of its network only this host's own address and the
    broadcast address, at which this host listens too, are denied.  An IPv6 network is denied as a whole: packets
    to many addresses in it would fill the kernel's neighbour table, which the whole host shares.
    """
    import psutil  # imported here, as it would slow down every start of the manager

    outgoing = _outgoing(proc)
    found: list[IpNetwork] = [*METADATA_NETWORKS]
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family not in {socket.AF_INET, socket.AF_INET6}:
                continue
            address = one.address.partition("%")[0]
            if ip_interface(address).is_loopback or ip_interface(address).is_link_local:
                continue
            found.append(ip_network(address))
            if one.netmask:
                network = ip_interface(f"{address}/{_bits(one.netmask)}").network
                if name not in outgoing or (network.version == 6 and network.num_addresses >= _NEIGHBOURS):
                    found.append(network)
                elif network.version == 4 and network.num_addresses > 2:
                    found.append(ip_network(network.broadcast_address))
    found += map(ip_network, extra)
    v4 = list(collapse_addresses(one for one in found if one.version == 4))  # each container may have a bridge
    v6 = [one for one in found if one.version == 6]
    return list(dict.fromkeys([*v6, *map(_embedded, v4), *v4]))


def _embedded(network: IPv4Network) -> IPv6Network:
    """Return an IPv4 network as NAT64 reaches it."""
    address = IPv6Address(int(_NAT64.network_address) + int(network.network_address))
    return IPv6Network((address, _NAT64.prefixlen + network.prefixlen))


def listening_endpoints(pid: int, sockets: Container[str] | None = None, proc: Path = Path("/proc")) -> list[str]:
    """Return where the processes in a process's network namespace listen, such as ``tcp:127.0.0.1:8888``.

    :param sockets: only these, by their links in ``/proc/PID/fd``, such as ``socket:[123]``.
    """
    found = []
    for table in ("tcp", "tcp6"):
        for fields in map(str.split, _lines(proc / f"{pid}/net/{table}")[1:]):
            if fields[3] == _LISTEN:
                address, _, port = fields[1].partition(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                found.append((fields[9], Endpoint.tcp(str(ip_address(b"".join(words))), int(port, 16))))
    for line in _lines(proc / f"{pid}/net/unix")[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) > 7 and int(fields[3], 16) & _ACCEPTS:
            found.append((fields[6], Endpoint.unix(fields[7])))
    own = [str(one) for inode, one in found if sockets is None or f"socket:[{inode}]" in sockets]
    return list(dict.fromkeys(own))


def _outgoing(proc: Path) -> set[str]:
    """Return the interfaces with a default route."""
    v4 = [line.split() for line in _lines(proc / "net/route")[1:]]
    v6 = [line.split() for line in _lines(proc / "net/ipv6_route")]
    return {row[0] for row in v4 if row[1] == row[7] == "00000000"} | {
        row[9] for row in v6 if row[0] == "0" * 32 and row[1] == "00" and row[9] != "lo"
    }


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []  # IPv6 is off, or the process has ended


def _bits(netmask: str) -> int:
    family = socket.AF_INET6 if ":" in netmask else socket.AF_INET
    return int.from_bytes(socket.inet_pton(family, netmask.partition("/")[0]), "big").bit_count()
