"""libvirt: ports, MAC addresses, networks and their filters."""

import ipaddress
import socket

import pytest

pytest.importorskip("libvirt")

from lxml import etree

from dispatcher.plugin import METADATA_NETWORKS, ProviderError
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


def test_mac_addresses_are_an_agents_own():
    assert network.mac_address("a") == network.mac_address("a")
    assert len({network.mac_address(f"dispatcher-{n}") for n in range(500)}) == 500
    assert network.mac_address("x").startswith("52:54:00:")


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
    drops = {
        f"{one.get('dstipaddr')}/{one.get('dstipmask')}"
        for rule in rules
        if rule.get("action") == "drop"
        for one in rule
        if one.get("dstipaddr")
    }
    assert {"192.0.2.0/24", "198.51.100.7/32", "169.254.0.0/16", "168.63.129.16/32", "100.100.100.200/32"} <= drops
    dns = [rule for rule in rules if rule[0].get("dstportstart") == "53"]
    assert {rule[0].get("dstipaddr") for rule in dns} == {"192.0.2.1"}
    assert rules[-1].get("action") == "drop"
    accept_all = next(rule for rule in rules if rule.get("priority") == "600")
    assert int(accept_all.get("priority")) > max(
        int(rule.get("priority")) for rule in rules if rule[0].get("dstipmask")
    )
