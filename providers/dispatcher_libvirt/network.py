"""Networks of machines: forwarded ports, addresses on libvirt networks and their filters, arguments of ssh.

The provider chooses each machine's addresses, and a DHCP reservation in the libvirt network records them: libvirt
refuses a second one of the same address, whichever process asks, and dnsmasq gives it to nobody else.  The guest
finds its address on its cloud-init disk and may use no other; DHCP does not pass the filter.

One network filter per installation and libvirt network protects the host from the guests there.  The first
machine that needs it defines it, the last one removes it.  It bounds the number of connections, and
`new_connections` their rate.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import random
import socket
import threading
import uuid
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs, urlsplit

import libvirt
from lxml import etree

from dispatcher.plugin import (
    MAX_CONNECTIONS,
    METADATA_NETWORKS,
    Deadline,
    ProviderError,
    boottime,
    denied_networks,
)
from dispatcher_libvirt import errors
from dispatcher_libvirt.connection import Backend, Lane
from dispatcher_libvirt.new_connections import NewConnections
from dispatcher_libvirt.xml_input import element, parse_xml

Network4 = ipaddress.IPv4Network
_RESERVED = 30.0  # seconds before an allocated port is allocated again
_FORWARD_MODES = frozenset({"nat", "route", "open", ""})
#: This network, loopback, multicast, reserved and broadcast: services of this host listen at some of them.
_SPECIAL_NETWORKS = tuple(map(Network4, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3")))
_RESERVATIONS = libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A machine's interface on a libvirt network.

    :ivar filter: name of the network filter that protects the host and prevents forged addresses.
    """

    network: str
    filter: str
    address: ipaddress.IPv4Interface
    gateway: ipaddress.IPv4Address

    @property
    def mac(self) -> str:
        """The MAC address."""
        return mac_address(self.address)


def mac_address(address: ipaddress.IPv4Interface) -> str:
    """Return the MAC address of a machine with an IP address: nobody can choose another's."""
    return "52:54:" + address.ip.packed.hex(":")


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
    found = [one for one in root.iterfind("ip[@address]") if one.get("family", "ipv4") == "ipv4"]
    if not found:
        return NetworkInfo(forward=mode, gateway=None, subnet=None)
    one = next((one for one in found if one.find("dhcp") is not None), found[0])  # as libvirt takes reservations
    mask = one.get("netmask") or one.get("prefix") or "24"
    interface = ipaddress.IPv4Interface(f"{one.get('address')}/{mask}")
    return NetworkInfo(forward=mode, gateway=interface.ip, subnet=interface.network)


def free_address(name: str, network: NetworkInfo, taken: Container[str]) -> ipaddress.IPv4Interface:
    """Return a free address of a network, for one name the same if possible.

    :raises ProviderError: there is none.
    """
    assert network.subnet is not None
    size = network.subnet.num_addresses - 2
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    for step in range(size):
        address = network.subnet[1 + (first + step) % size]
        if address != network.gateway and str(address) not in taken:
            return ipaddress.IPv4Interface(f"{address}/{network.subnet.prefixlen}")
    raise ProviderError(
        f"No address of {network.subnet} is free",
        why="each machine on a libvirt network has its own",
        fix="stop machines, or use a larger network",
    )


def guest_filter(name: str, network: NetworkInfo, denied: Iterable[Network4 | ipaddress.IPv6Network]) -> str:
    """Return the network filter for guests: no forged addresses, and of the host only DNS.

    Connections into a guest come from the host alone: the bridge isolates its ports.  IPv6 does not pass at all.
    """
    dns = {"dstipaddr": network.gateway, "dstportstart": 53}
    refused = {one for one in denied if one.version == 4} | {*_SPECIAL_NETWORKS}
    refused |= {network.subnet} if network.subnet else set()
    rules = [
        _rule("accept", "inout", 100, "all", state="ESTABLISHED,RELATED"),
        _rule("accept", "in", 300, "tcp", state="NEW"),
        _rule("drop", "out", 350, "all", **{"connlimit-above": MAX_CONNECTIONS}),
        *[_rule("accept", "out", 400, protocol, **dns) for protocol in ("udp", "tcp") if network.gateway],
        *[
            _rule("drop", "out", 500, "all", dstipaddr=one.network_address, dstipmask=one.prefixlen)
            for one in ipaddress.collapse_addresses(refused)
        ],
        _rule("accept", "out", 600, "all"),
        _rule("drop", "inout", 1000, "all"),
    ]
    same = element("uuid", uuid.uuid5(uuid.NAMESPACE_OID, name))  # libvirt updates no filter with another
    root = element("filter", same, element("filterref", filter="clean-traffic"), *rules, name=name, chain="root")
    return etree.tostring(root, encoding="unicode", pretty_print=True)


def _rule(action: str, direction: str, priority: int, protocol: str, **match: object) -> etree._Element:
    return element("rule", element(protocol, **match), action=action, direction=direction, priority=priority)


class NetworkFilters:
    """The filters of one installation, and its machines' addresses.

    :param rates: the bounds of machines' new connections.
    """

    def __init__(self, backend: Backend, installation: str, rates: NewConnections) -> None:
        self._backend, self._rates = backend, rates
        self._prefix = f"dispatcher-{installation}-"
        self._lock = threading.Lock()
        self._defined: dict[str, str] = {}  # by name: the last definition from this instance

    def claim(self, name: str, machine: str, avoid: Collection[str], deadline: Deadline) -> Interface:
        """Start a network, reserve an address for a machine, update the filter; return the machine's interface.

        :param avoid: addresses of other machines, which may be saved and absent from the network's definition.
        :raises ProviderError: there is no such network, it cannot isolate guests, or it has no free address.
        """
        filter_name = self._prefix + name
        denied = METADATA_NETWORKS if errors.is_remote(self._backend.uri) else denied_networks()

        def claim(connection: libvirt.virConnect) -> Interface:
            found = connection.networkLookupByName(name)
            try:
                if not found.isActive():
                    found.create()
            except libvirt.libvirtError:
                if not found.isActive():  # no other start was faster
                    raise
            info = parse_network(found.XMLDesc())
            if info.forward not in _FORWARD_MODES or info.gateway is None:
                raise ProviderError(
                    f"The libvirt network {name} cannot be used",
                    why=f"its mode is {info.forward or 'isolated'!r}, and libvirt has no IPv4 address on it",
                    fix='use one with forward mode "nat" or "route" and an IPv4 address',
                )
            address = _reserve(found, machine, info, avoid, deadline)
            wanted = guest_filter(filter_name, info, denied)
            with self._lock:
                if self._defined.get(filter_name) != wanted or not _exists(connection, filter_name):
                    connection.nwfilterDefineXML(wanted)
                    self._defined[filter_name] = wanted
            return Interface(network=name, filter=filter_name, address=address, gateway=info.gateway)

        what = f"preparing the network {name}"
        interface = self._backend.call(claim, what=what, deadline=deadline, lane=Lane.WORK)
        self._rates.add([str(interface.address.ip)], deadline)
        return interface

    def release(self, name: str, machine: str, deadline: Deadline, *, address: str = "") -> None:
        """Free a machine's address, and remove the filter with the last one.  Absent is success.

        :param address: as the machine's definition names it; the network's definition may be gone.
        """

        def addresses(connection: libvirt.virConnect) -> set[str]:
            try:
                return _addresses(connection.networkLookupByName(name), machine)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_NETWORK:
                    raise
                return set()

        def release(connection: libvirt.virConnect) -> None:
            with self._lock:
                try:
                    network = connection.networkLookupByName(name)
                    used = _cancel(network, machine, self._prefix)
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_NO_NETWORK:
                        raise
                    used = False
                if not used:
                    with contextlib.suppress(libvirt.libvirtError):  # in use, or absent
                        connection.nwfilterLookupByName(self._prefix + name).undefine()

        what = f"freeing the address of {machine}"
        call = partial(self._backend.call, what=what, deadline=deadline, lane=Lane.WORK)
        self._rates.remove(call(addresses) | ({address} if address else set()), deadline)
        call(release)


def _reserve(
    network: libvirt.virNetwork, machine: str, info: NetworkInfo, avoid: Collection[str], deadline: Deadline
) -> ipaddress.IPv4Interface:
    """Reserve a free address for a machine, in place of the one that it had."""
    _cancel(network, machine)
    taken = {*avoid, *(one["ipaddr"] for one in network.DHCPLeases())}
    taken |= {one.get("ip", "") for one in _reservations(network)}
    flags = libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
    flags |= libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG if network.isPersistent() else 0
    while True:
        address = free_address(machine, info, taken)
        host = element("host", mac=mac_address(address), name=machine, ip=address.ip)
        text = etree.tostring(host, encoding="unicode")
        try:
            network.update(libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, _RESERVATIONS, -1, text, flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or deadline.expired:
                raise
            taken.add(str(address.ip))  # another process was faster
        else:
            return address


def _cancel(network: libvirt.virNetwork, machine: str, prefix: str = "") -> bool:
    """Remove a machine's reservation, also from the network's next start; whether others of the prefix remain."""
    others = False
    for shown, flags in _definitions(network):
        for one in _reservations(network, shown):
            if one.get("name") == machine:
                text = etree.tostring(one, encoding="unicode")
                network.update(libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, _RESERVATIONS, -1, text, flags)
            else:
                others |= one.get("name", "").startswith(prefix)
    return others


def _addresses(network: libvirt.virNetwork, machine: str) -> set[str]:
    """Return the addresses that are reserved for a machine."""
    found = (one for shown, _ in _definitions(network) for one in _reservations(network, shown))
    return {one.get("ip", "") for one in found if one.get("name") == machine}


def _definitions(network: libvirt.virNetwork) -> list[tuple[int, int]]:
    """Return the flags that show and that change the running network, and the one of its next start."""
    found = [(0, libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE)] if network.isActive() else []
    if network.isPersistent():
        found.append((libvirt.VIR_NETWORK_XML_INACTIVE, libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG))
    return found


def _reservations(network: libvirt.virNetwork, flags: int = 0) -> Iterator[etree._Element]:
    return parse_xml(network.XMLDesc(flags)).iterfind("ip/dhcp/host")


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
