"""libvirt: ports, MAC addresses, networks and their filters."""

import ipaddress
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

libvirt = pytest.importorskip("libvirt")

from lxml import etree

from dispatcher.plugin import METADATA_NETWORKS, Deadline, ProviderError
from dispatcher_libvirt import network
from dispatcher_libvirt.network import Ports


def test_ports_are_free_and_not_given_twice():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = Ports(port, port)
        with pytest.raises(ProviderError, match="No port from"):
            ports.allocate()
    first, last = 21_500, 21_519
    ports = Ports(first, last)
    given = {ports.allocate() for _ in range(15)}
    assert len(given) == 15
    assert given <= set(range(first, last + 1))
    with pytest.raises(ProviderError, match="widen"):
        Ports(first, first).allocate(avoid=[first])


SMALL = network.NetworkInfo(
    forward="nat", gateway=ipaddress.IPv4Address("192.0.2.1"), subnet=ipaddress.IPv4Network("192.0.2.0/29")
)


def test_each_machine_on_a_network_has_its_own_addresses():
    taken, macs = set(), set()
    for name in "abcde":
        address = network.free_address(name, SMALL, taken)
        assert network.free_address(name, SMALL, taken) == address, "the same again after a restart"
        assert address.network == SMALL.subnet
        taken.add(str(address.ip))
        macs.add(network.mac_address(address))
    assert taken == {f"192.0.2.{n}" for n in range(2, 7)}
    assert len(macs) == 5
    with pytest.raises(ProviderError, match=r"No address of 192\.0\.2\.0/29 is free") as caught:
        network.free_address("f", SMALL, taken)
    assert "larger network" in caught.value.fix


class Rates:
    """The rules for new connections: the addresses that they hold for."""

    def __init__(self):
        self.bounded = set()

    def add(self, addresses, _):
        self.bounded |= set(addresses)

    def remove(self, addresses, _):
        self.bounded -= set(addresses)


class Libvirt:
    """A libvirt with one network; it refuses a second reservation of an address, as libvirt does."""

    def __init__(self, *hosts, leases=(), persistent=True):
        self.hosts = {flag: list(hosts) for flag in (1, 2)[: 1 + persistent]}  # running, and of the next start
        self.leases, self.persistent = leases, persistent
        self.uri = "qemu:///system"
        self.lock = threading.Lock()
        self.removed = False
        self.filters = {}
        self.rates = Rates()

    def call(self, function, **_):
        return function(self)

    def networkLookupByName(self, _):
        if self.removed:
            raise refused(libvirt.VIR_ERR_NO_NETWORK)
        return self

    def isActive(self):
        return True

    def isPersistent(self):
        return self.persistent

    def DHCPLeases(self):
        return [{"ipaddr": one} for one in self.leases]

    def XMLDesc(self, flags=0):
        hosts = "".join(self.hosts[2 if flags else 1])
        return (
            "<network><forward mode='nat'/><ip address='192.0.2.1' netmask='255.255.255.248'>"
            f"<dhcp>{hosts}</dhcp></ip></network>"
        )

    def update(self, command, section, parent, text, flags):
        assert (section, parent) == (libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, -1)
        with self.lock:
            for flag, hosts in self.hosts.items():
                if not flags & flag:
                    continue
                same = [
                    one for one in hosts if etree.fromstring(one).get("ip") == etree.fromstring(text).get("ip")
                ]
                if command == libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE:
                    hosts.remove(same[0])
                elif same:
                    raise refused(libvirt.VIR_ERR_OPERATION_INVALID)
                else:
                    hosts.append(text)

    def nwfilterLookupByName(self, name):
        self.name = name
        if name not in self.filters:
            raise refused(libvirt.VIR_ERR_NO_NWFILTER)
        return self

    def nwfilterDefineXML(self, text):
        name, identity = (root := etree.fromstring(text)).get("name"), root.findtext("uuid")
        if self.filters.setdefault(name, identity) != identity:
            raise refused(libvirt.VIR_ERR_OPERATION_FAILED)

    def undefine(self):
        del self.filters[self.name]


def refused(code):
    error = libvirt.libvirtError("refused")
    error.err = (code, 0, "refused", 0, "", None, None, 0, 0)
    return error


def filters_of(backend, installation="0123abcd"):
    return network.NetworkFilters(backend, installation, backend.rates)


def claim(filters, name, *avoid):
    interface = filters.claim("n", f"dispatcher-0123abcd-{name}", avoid, Deadline(5))
    return str(interface.address.ip)


def test_addresses_are_unique_under_concurrency_and_free_after_removal():
    backend = Libvirt()
    both = [filters_of(backend), filters_of(backend)]  # two processes: libvirt alone decides
    with ThreadPoolExecutor(5) as pool:
        given = list(pool.map(claim, [both[n % 2] for n in range(5)], "abcde"))
    assert sorted(given) == [f"192.0.2.{n}" for n in range(2, 7)]
    assert claim(both[0], "a") == given[0], "a machine that starts again has one address"
    with pytest.raises(ProviderError, match="No address"):
        claim(both[0], "f")
    both[1].release("n", "dispatcher-0123abcd-c", Deadline(5))
    both[1].release("n", "dispatcher-0123abcd-c", Deadline(5))
    assert claim(both[0], "f") == given[2]
    assert backend.rates.bounded == set(given)
    for name in "abcdef":
        assert backend.filters, "a sleeping machine needs the filter too"
        both[0].release("n", f"dispatcher-0123abcd-{name}", Deadline(5))
    assert (backend.filters, backend.hosts, backend.rates.bounded) == ({}, {1: [], 2: []}, set())


def test_no_rule_is_left_of_a_machine_whose_network_was_removed():
    backend = Libvirt()
    filters = filters_of(backend)
    address = claim(filters, "a")
    backend.removed = True
    filters.release("n", "dispatcher-0123abcd-a", Deadline(5), address=address)
    assert backend.rates.bounded == set()


def test_addresses_in_use_by_others_are_not_given():
    operators = "<host mac='52:54:00:00:00:01' ip='192.0.2.2'/>"
    backend = Libvirt(operators, leases=["192.0.2.3"], persistent=False)
    filters = filters_of(backend)
    assert claim(filters, "a", "192.0.2.4", "192.0.2.5") == "192.0.2.6"
    filters.release("n", "dispatcher-0123abcd-a", Deadline(5))
    assert backend.hosts == {1: [operators]}


def test_networks_are_parsed():
    info = network.parse_network(
        "<network><name>n</name><forward mode='nat'/><ip address='192.0.2.1' netmask='255.255.255.0'/></network>"
    )
    assert info.forward == "nat"
    assert (info.gateway, info.subnet) == (ipaddress.ip_address("192.0.2.1"), ipaddress.ip_network("192.0.2.0/24"))
    bare = network.parse_network("<network><name>n</name><bridge name='br0'/></network>")
    assert (bare.forward, bare.gateway) == ("", None)


def test_the_filter_protects_the_host():
    info = network.parse_network(
        "<network><name>n</name><forward mode='nat'/><ip address='192.0.2.1' netmask='255.255.255.0'/></network>"
    )
    denied = [*METADATA_NETWORKS, ipaddress.ip_network("198.51.100.7/32")]
    root = etree.fromstring(network.guest_filter("f", info, denied))
    assert root.find("filterref").get("filter") == "clean-traffic"
    rules = sorted(root.iterfind("rule"), key=lambda rule: int(rule.get("priority")))
    bound = next(rule for rule in rules if rule.find("all[@connlimit-above]") is not None)
    accepted = [
        int(rule.get("priority"))
        for rule in rules
        if rule.get("action") == "accept" and rule[0].get("state") is None
    ]
    assert bound.get("direction") == "out" and int(bound.get("priority")) < min(accepted), (
        "the host's table of connections"
    )
    drops = {
        f"{one.get('dstipaddr')}/{one.get('dstipmask')}"
        for rule in rules
        if rule.get("action") == "drop"
        for one in rule
        if one.get("dstipaddr")
    }
    assert {
        "0.0.0.0/8",
        "224.0.0.0/3",
        "192.0.2.0/24",
        "198.51.100.7/32",
        "169.254.0.0/16",
        "168.63.129.16/32",
        "100.100.100.200/32",
    } <= drops
    dns = [rule for rule in rules if rule[0].get("dstportstart") == "53"]
    assert {rule[0].get("dstipaddr") for rule in dns} == {"192.0.2.1"}
    assert not [rule for rule in rules if rule[0].get("dstportstart") in {"67", "68"}], "no DHCP"
    assert rules[-1].get("action") == "drop"
    accept_all = next(rule for rule in rules if rule.get("priority") == "600")
    assert int(accept_all.get("priority")) > max(
        int(rule.get("priority")) for rule in rules if rule[0].get("dstipmask")
    )
