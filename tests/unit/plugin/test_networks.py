"""The networks that no private network reaches."""

import os
import socket
from collections import namedtuple
from ipaddress import ip_address

import psutil
import pytest

from dispatcher.plugin import METADATA_NETWORKS
from dispatcher.plugin.networks import denied_networks, listening_endpoints

Address = namedtuple("Address", "family address netmask")
V4, V6 = socket.AF_INET, socket.AF_INET6
ROUTE = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\neth0 00000000 01 3 0 0 0 00000000 0 0 0\n"
ROUTE6 = "{0} 00 {0} 00 {0} 00000400 0 0 3 wan6\n{0} 00 {0} 00 {0} ffffffff 1 0 200200 lo\n".format("0" * 32)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.170.2",  # credentials of an ECS task
        "168.63.129.16",
        "100.100.100.200",
        "fd00:ec2::254",
        "fe80::a9fe:a9fe",
        "fe80::1",
        "2002:a9fe:a9fe::1",  # 6to4 and NAT64 of a site: with IPv4 addresses inside
        "64:ff9b:1::a9fe:a9fe",
    ],
)
def test_metadata_services_are_denied(address):
    assert any(ip_address(address) in network for network in METADATA_NETWORKS)


def test_this_host_and_networks_that_only_it_is_in_are_denied(monkeypatch, tmp_path):
    found = {
        "lo": [Address(V4, "127.0.0.1", "255.0.0.0"), Address(V6, "::1", "ffff::")],
        "eth0": [
            Address(V4, "10.0.0.5", "255.255.255.0"),
            Address(V6, "fe80::1%eth0", "ffff:ffff:ffff:ffff::"),
            Address(V6, "fd00::5", "ffff:ffff:ffff:ffff::"),
            Address(socket.AF_PACKET, "00:00:00:00:00:00", None),
        ],
        "wan6": [Address(V6, "2001:db8::5", "ffff:ffff:ffff:ffff::")],
        "docker0": [Address(V4, "172.17.0.1", "255.255.0.0"), Address(V6, "fd17::1", "ffff:ffff:ffff:ffff::")],
        "bridge1": [Address(V4, "172.18.0.1", "255.255.255.248")],
        "bridge2": [Address(V4, "172.18.0.9", "255.255.255.248")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    (tmp_path / "net").mkdir()
    (tmp_path / "net/route").write_text(ROUTE)
    (tmp_path / "net/ipv6_route").write_text(ROUTE6)
    denied = denied_networks(["192.0.2.0/24"], proc=tmp_path)
    assert set(METADATA_NETWORKS) <= set(denied)
    own = [str(one) for one in denied if one not in METADATA_NETWORKS]
    assert [one for one in own if not one.startswith("64:ff9b::")] == [
        "fd00::5/128",
        "fd00::/64",  # large enough to fill the kernel's table of neighbours
        "2001:db8::5/128",
        "2001:db8::/64",
        "fd17::1/128",
        "fd17::/64",
        "10.0.0.5/32",
        "10.0.0.255/32",
        "172.17.0.0/16",
        "172.18.0.0/28",  # both bridges
        "192.0.2.0/24",
    ]
    for v4, embedded in (
        ("169.254.169.254", "64:ff9b::a9fe:a9fe"),
        ("10.0.0.5", "64:ff9b::a00:5"),
        ("172.17.3.4", "64:ff9b::ac11:304"),
        ("192.0.2.1", "64:ff9b::c000:201"),
    ):
        for address in (v4, embedded):
            assert any(ip_address(address) in network for network in denied), address
    assert not any(ip_address("64:ff9b::cb00:7105") in network for network in denied), "all of IPv4 else"


def test_a_host_without_routes_and_ipv6_denies_its_whole_networks(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [Address(V4, "10.0.0.5", "255.255.255.0")]})
    denied = denied_networks(proc=tmp_path)
    assert "10.0.0.0/24" in {str(one) for one in denied}


def test_listening_sockets_of_a_namespace_are_found(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as v4,
        socket.create_server(("::1", 0), family=V6) as v6,
        socket.socket(socket.AF_UNIX) as unix,
        socket.create_connection(v4.getsockname()),
    ):
        path = str(tmp_path / "a socket")
        unix.bind(path)
        unix.listen()
        own = {os.readlink(f"/proc/self/fd/{one.fileno()}") for one in (v4, v6, unix)}
        expected = [f"tcp:127.0.0.1:{v4.getsockname()[1]}", f"tcp:[::1]:{v6.getsockname()[1]}", f"unix:{path}"]
        assert listening_endpoints(os.getpid(), own) == expected
        assert set(expected) <= set(listening_endpoints(os.getpid()))
        assert listening_endpoints(os.getpid(), []) == []


def test_a_process_that_has_ended_listens_nowhere(tmp_path):
    assert listening_endpoints(1, proc=tmp_path) == []
