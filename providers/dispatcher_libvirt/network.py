"""Networks of machines: forwarded ports, MAC addresses, libvirt networks with their filters, arguments of ssh.

One network filter per installation and libvirt network protects the host from the guests there.  The first
machine that needs it defines it, the last one removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import libvirt
from lxml import etree

from dispatcher.plugin import (
    METADATA_NETWORKS,
    Deadline,
    ProviderError,
    boottime,
    denied_networks,
)
from dispatcher_libvirt import errors
from dispatcher_libvirt.connection import Backend, Lane
from dispatcher_libvirt.xml_input import element, parse_xml

Network4 = ipaddress.IPv4Network
_RESERVED = 30.0  # seconds before an allocated port is allocated again
_FORWARD_MODES = frozenset({"nat", "route", "open", ""})


def mac_address(name: str) -> str:
    """Return an agent's MAC address, in QEMU's range, always the same for one backend name."""
    digest = hashlib.sha256(name.encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


class Ports:
    """Allocates ports that look free.

    QEMU binds the port itself and does not start where it cannot, so this is only a guess; while a machine runs,
    its QEMU holds the port.

    :param local: machines run on this host, so that its ports can be tested.
    """

    def __init__(self, first: int, last: int, *, local: bool = True) -> None:
        self._local = local
        self._range = range(first, last + 1)
        self._lock = threading.Lock()
        self._allocated: dict[int, float] = {}

    def allocate(self, *, avoid: Iterable[int] = ()) -> int:
        """Return a free port.

        :raises ProviderError: all are in use.
        """
        with self._lock:
            now = boottime()
            self._allocated = {port: until for port, until in self._allocated.items() if until > now}
            excluded = {*avoid, *self._allocated}
            for port in random.sample(self._range, len(self._range)):
                if port not in excluded and (not self._local or _free(port)):
                    self._allocated[port] = now + _RESERVED
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
    """A libvirt network.

    :ivar forward: ``""`` for an isolated one, else nat, route, open, bridge, ...
    """

    forward: str
    gateway: ipaddress.IPv4Address | None
    subnet: Network4 | None


def parse_network(text: str) -> NetworkInfo:
    """Return a network from its XML."""
    root = parse_xml(text)
    forward = root.find("forward")
    mode = "" if forward is None else forward.get("mode", "nat")
    for one in root.iterfind("ip[@address]"):
        if one.get("family", "ipv4") == "ipv4":
            mask = one.get("netmask") or one.get("prefix") or "24"
            interface = ipaddress.IPv4Interface(f"{one.get('address')}/{mask}")
            return NetworkInfo(forward=mode, gateway=interface.ip, subnet=interface.network)
    return NetworkInfo(forward=mode, gateway=None, subnet=None)


def guest_filter(name: str, network: NetworkInfo, denied: Iterable[Network4 | ipaddress.IPv6Network]) -> str:
    """Return the network filter for guests: no forged addresses, and of the host only DHCP and DNS.

    Connections into a guest come from the host alone: the bridge isolates its ports.  IPv6 does not pass at all.
    """
    dns = {"dstipaddr": network.gateway, "dstportstart": 53}
    refused = {one for one in denied if one.version == 4} | ({network.subnet} if network.subnet else set())
    rules = [
        _rule("accept", "inout", 100, "all", state="ESTABLISHED,RELATED"),
        _rule("accept", "out", 200, "udp", srcportstart=68, dstportstart=67),
        _rule("accept", "in", 200, "udp", srcportstart=67, dstportstart=68),
        _rule("accept", "in", 300, "tcp", state="NEW"),
        *[_rule("accept", "out", 400, protocol, **dns) for protocol in ("udp", "tcp") if network.gateway],
        *[
            _rule("drop", "out", 500, "all", dstipaddr=one.network_address, dstipmask=one.prefixlen)
            for one in ipaddress.collapse_addresses(refused)
        ],
        _rule("accept", "out", 600, "all"),
        _rule("drop", "inout", 1000, "all"),
    ]
    root = element("filter", element("filterref", filter="clean-traffic"), *rules, name=name, chain="root")
    return etree.tostring(root, encoding="unicode", pretty_print=True)


def _rule(action: str, direction: str, priority: int, protocol: str, **match: object) -> etree._Element:
    return element("rule", element(protocol, **match), action=action, direction=direction, priority=priority)


class NetworkFilters:
    """The filters of one installation."""

    def __init__(self, backend: Backend, installation: str) -> None:
        self._backend = backend
        self._prefix = f"dispatcher-{installation}-"
        self._lock = threading.Lock()
        self._starting: Counter[str] = Counter()  # by network: machines that are starting on it
        self._defined: dict[str, str] = {}  # by name: the last definition from this instance

    @contextlib.contextmanager
    def active(self, name: str, deadline: Deadline) -> Iterator[str]:
        """Start a network, update its filter, and yield the filter's name; "" for no network.

        :raises ProviderError: there is no such network, or it cannot isolate guests.
        """
        if not name:
            yield ""
            return
        with self._lock:
            self._starting[name] += 1
        try:
            yield self._prepare(name, deadline)
        finally:
            with self._lock:
                self._starting[name] -= 1

    def remove(self, name: str, deadline: Deadline) -> None:
        """Remove a network's filter unless a machine uses it."""
        filter_name = self._prefix + name

        def remove(connection: libvirt.virConnect) -> None:
            with self._lock:
                if self._starting[name]:
                    return
                with contextlib.suppress(libvirt.libvirtError):  # in use, or absent
                    connection.nwfilterLookupByName(filter_name).undefine()

        self._backend.call(remove, what=f"removing the filter {filter_name}", deadline=deadline)

    def _prepare(self, name: str, deadline: Deadline) -> str:
        filter_name = self._prefix + name
        denied = METADATA_NETWORKS if errors.is_remote(self._backend.uri) else denied_networks()

        def prepare(connection: libvirt.virConnect) -> NetworkInfo:
            found = connection.networkLookupByName(name)
            if not found.isActive():
                found.create()
            info = parse_network(found.XMLDesc())
            wanted = guest_filter(filter_name, info, denied)
            with self._lock:
                if self._defined.get(filter_name) != wanted or not _exists(connection, filter_name):
                    connection.nwfilterDefineXML(wanted)
                    self._defined[filter_name] = wanted
            return info

        what = f"preparing the network {name}"
        info = self._backend.call(prepare, what=what, deadline=deadline, lane=Lane.WORK)
        if info.forward not in _FORWARD_MODES or info.gateway is None:
            raise ProviderError(
                f"The libvirt network {name} cannot be used",
                why=f"its mode is {info.forward or 'isolated'!r}, and libvirt assigns no addresses on it",
                fix='use one with forward mode "nat" or "route" and DHCP',
            )
        return filter_name


def _exists(connection: libvirt.virConnect, name: str) -> bool:
    try:
        connection.nwfilterLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NWFILTER:
            return False
        raise
    return True


def ssh_arguments(uri: str) -> tuple[str, list[str], str]:
    """Return the program, options and destination of ssh for a libvirt URI."""
    parts = urlsplit(uri)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    options: list[str] = []
    if parts.port:
        options += ["-p", str(parts.port)]
    if parts.username:
        options += ["-l", parts.username]
    if "keyfile" in query:
        options += ["-i", query["keyfile"]]
    if "known_hosts" in query:
        options += ["-o", f"UserKnownHostsFile={query['known_hosts']}"]
    if query.get("no_verify") == "1":
        options += ["-o", "StrictHostKeyChecking=no"]
    return query.get("command", "ssh"), options, parts.hostname or ""
