"""Addresses that a private network must not reach."""

import psutil
from dispatcher_subprocess import network


def test_what_a_private_network_must_not_reach(monkeypatch):
    import socket
    from collections import namedtuple

    address = namedtuple("address", "family address netmask")
    monkeypatch.setattr(network, "outgoing_interface", lambda: "eth0")
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {
            "lo": [address(socket.AF_INET, "127.0.0.1", "255.0.0.0"), address(socket.AF_INET6, "::1", "ffff::")],
            "eth0": [
                address(socket.AF_INET, "10.0.0.5", "255.255.255.0"),
                address(socket.AF_INET6, "fe80::1%eth0", "ffff:ffff:ffff:ffff::"),
                address(socket.AF_INET6, "fd00::5", "ffff:ffff:ffff:ffff::"),
                address(socket.AF_PACKET, "00:00:00:00:00:00", None),
            ],
            "docker0": [address(socket.AF_INET, "172.17.0.1", "255.255.0.0")],
        },
    )
    assert [str(one) for one in network.host_networks()] == [
        "10.0.0.5/32",
        "fd00::5/128",
        "172.17.0.1/32",
        "172.17.0.0/16",
    ]
