"""Ports on 127.0.0.1, MAC addresses, and what guests on a libvirt network may reach.

Touches sockets (to see what is free) and the host's table of addresses; the filter itself is built purely.
"""

from __future__ import annotations

import hashlib
import ipaddress
import random
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from lxml import etree

from dispatcher.plugin import ProviderError, boottime

Network4 = ipaddress.IPv4Network
_RESERVED = 30.0  # seconds for which a port that was given out is not given out again
_LINK_LOCAL = ipaddress.IPv4Network("169.254.0.0/16")


def mac_address(name: str) -> str:
    """Return an agent's MAC address, in QEMU's range, always the same for one backend name."""
    digest = hashlib.sha256(name.encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


class Ports:
    """Gives out ports that nobody has now, as far as can be seen from here.

    QEMU binds the port itself and does not start where it cannot, so what is given out here is only a good
    guess: while a machine runs, its port is its QEMU's and nobody else's.
    """

    def __init__(self, first: int, last: int, *, here: bool = True) -> None:
        self._here = here
        self._range = range(first, last + 1)
        self._lock = threading.Lock()
        self._given: dict[int, float] = {}

    def take(self, *, wanted: int = 0, avoid: Iterable[int] = ()) -> int:
        """Return a free port, `wanted` if that is free.

        :raises ProviderError: all are taken.
        """
        avoid = set(avoid)
        with self._lock:
            now = boottime()
            self._given = {port: until for port, until in self._given.items() if until > now}
            tries = random.sample(self._range, len(self._range))
            for port in ([wanted] if wanted in self._range else []) + tries:
                if (
                    port not in avoid
                    and (port == wanted or port not in self._given)
                    and (not self._here or _free(port))
                ):
                    self._given[port] = now + _RESERVED
                    return port
        raise ProviderError(
            f"No port from {self._range[0]} to {self._range[-1]} is free",
            why="each machine needs one on 127.0.0.1",
            fix="widen providers.libvirt.ports",
        )


def _free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU does
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen(1)
        except OSError:
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInfo:
    """What a libvirt network is, from its XML.

    :ivar forward: ``""`` for an isolated one, else nat, route, open, bridge, ...
    """

    name: str
    forward: str
    gateway: ipaddress.IPv4Address | None
    subnet: Network4 | None


def parse_network(text: str) -> NetworkInfo:
    """Return what a network's XML says."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    root = etree.fromstring(text, parser)
    forward = root.find("forward")
    gateway: ipaddress.IPv4Address | None = None
    subnet: Network4 | None = None
    for element in root.iterfind("ip"):
        address = element.get("address", "")
        if element.get("family", "ipv4") == "ipv4" and address:
            gateway = ipaddress.IPv4Address(address)
            mask = element.get("netmask") or element.get("prefix") or "24"
            subnet = ipaddress.IPv4Network(f"{address}/{mask}", strict=False)
            break
    return NetworkInfo(
        name=root.findtext("name") or "",
        forward="" if forward is None else forward.get("mode", "nat"),
        gateway=gateway,
        subnet=subnet,
    )


def host_networks(route: str | None = None) -> set[Network4]:
    """Return what of this host a guest must not reach: its addresses, and networks that only this host has.

    An interface with a default route leads outside: of its network only this host's own address counts.
    """
    text = Path("/proc/net/route").read_text(encoding="ascii") if route is None else route
    outside = {line.split()[0] for line in text.splitlines()[1:] if line.split()[1] == "00000000"}
    networks = set()
    for interface, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family is not socket.AF_INET:
                continue
            networks.add(ipaddress.IPv4Network(address.address))
            if interface not in outside and address.netmask:
                networks.add(ipaddress.IPv4Network(f"{address.address}/{address.netmask}", strict=False))
    return networks


def guest_filter(name: str, network: NetworkInfo, host: Iterable[Network4]) -> str:
    """Return the network filter for guests: no forged addresses, nothing of the host but DHCP and its DNS.

    Connections into the guest come from the host alone: the bridge keeps its ports apart.
    """
    root = etree.Element("filter", name=name, chain="root")
    etree.SubElement(root, "filterref", filter="clean-traffic")
    established = {"state": "ESTABLISHED,RELATED"}
    _rule(root, "accept", "inout", 100, "all", established)
    _rule(root, "accept", "out", 200, "udp", {"srcportstart": "68", "dstportstart": "67"})
    _rule(root, "accept", "in", 200, "udp", {"srcportstart": "67", "dstportstart": "68"})
    _rule(root, "accept", "in", 300, "tcp", {"state": "NEW"})
    if network.gateway:
        for protocol in ("udp", "tcp"):
            to = {"dstipaddr": str(network.gateway), "dstportstart": "53"}
            _rule(root, "accept", "out", 400, protocol, to)
    refused = {*host, _LINK_LOCAL, *([network.subnet] if network.subnet else [])}
    for one in ipaddress.collapse_addresses(refused):
        where = {"dstipaddr": str(one.network_address), "dstipmask": str(one.prefixlen)}
        _rule(root, "drop", "out", 500, "all", where)
    _rule(root, "accept", "out", 600, "all", {})
    _rule(root, "drop", "inout", 1000, "all", {})
    return etree.tostring(root, encoding="unicode", pretty_print=True)


def _rule(
    root: etree._Element, action: str, direction: str, priority: int, protocol: str, attributes: dict[str, str]
) -> None:
    rule = etree.SubElement(root, "rule", action=action, direction=direction, priority=str(priority))
    etree.SubElement(rule, protocol, attributes)
