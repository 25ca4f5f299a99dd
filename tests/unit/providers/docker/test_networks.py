"""Firewall rules of the bridge."""

from ipaddress import ip_address, ip_network

import pytest

from dispatcher.plugin import Deadline
from dispatcher_docker import networks
from dispatcher_docker.networks import _Firewall, chain, input_chain


def test_dns_of_a_denied_network_passes_and_nothing_else_of_it():
    """A name server may lie beside the metadata service, as on Azure and Google."""
    servers = [ip_address(one) for one in ("168.63.129.16", "192.0.2.53", "fd00::53")]
    denied = [ip_network("168.63.129.16/32"), ip_network("169.254.0.0/16")]
    assert chain("dsp-1", denied, servers, first="dsp-1-new").splitlines() == [
        "*filter",
        ":dsp-1 - [0:0]",
        "-A dsp-1 -j dsp-1-new",
        "-A dsp-1 -d 168.63.129.16 -p udp --dport 53 -j RETURN",
        "-A dsp-1 -d 168.63.129.16 -p tcp --dport 53 -j RETURN",
        "-A dsp-1 -d 168.63.129.16/32 -j REJECT",
        "-A dsp-1 -d 169.254.0.0/16 -j REJECT",
        "-A dsp-1 -o dsp-1+ -j REJECT",
        "COMMIT",
    ]


def test_of_what_goes_to_this_host_only_dns_to_its_name_servers_passes():
    assert input_chain("dsp-1-in", [ip_address("192.0.2.53")], first="dsp-1-new").splitlines() == [
        "*filter",
        ":dsp-1-in - [0:0]",
        "-A dsp-1-in -j dsp-1-new",
        "-A dsp-1-in -d 192.0.2.53 -p udp --dport 53 -j RETURN",
        "-A dsp-1-in -d 192.0.2.53 -p tcp --dport 53 -j RETURN",
        "-A dsp-1-in -j REJECT",
        "COMMIT",
    ]


def test_the_firewall_lets_dns_to_this_host_pass(monkeypatch, tmp_path):
    """The host may run its own name server, which resolv.conf then names by an address of the host."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fd00::1\n")
    monkeypatch.setattr(networks, "_RESOLVERS", (str(tmp_path / "resolv.conf"),))
    firewall = _Firewall(4, "dsp-1", Deadline(5))
    ran = []

    def run(program, *arguments, stdin=""):
        ran.append((arguments, stdin))
        return "-C" not in arguments

    monkeypatch.setattr(firewall, "_run", run)
    firewall.fill([])
    firewall.enter_input()
    allowed = [line for line in ran[0][1].splitlines() if line.startswith("-A dsp-1-in")]
    assert allowed[1] == "-A dsp-1-in -d 192.0.2.1 -p udp --dport 53 -j RETURN"
    assert allowed[3:] == ["-A dsp-1-in -j REJECT"]
    jumps = [(one[2], one[-1]) for one, _ in ran[1:]]
    assert jumps == [("-C", "dsp-1-in"), ("-I", "dsp-1-in")]


def test_podman_s_own_rules_come_after_those_for_forwarded_packets(monkeypatch):
    firewall = _Firewall(4, "dsp-1", Deadline(5), early=True)
    ran = []
    monkeypatch.setattr(
        firewall, "_run", lambda *words, stdin="": ran.append((*words, stdin)) or "-C" not in words
    )
    firewall.bound()
    firewall.fill([ip_network("169.254.0.0/16")])
    firewall.enter_forward()
    mangle = next(one[-1] for one in ran if ":dsp-1 - " in one[-1])
    assert mangle.startswith("*mangle\n") and "-A dsp-1 -d 169.254.0.0/16 -j DROP\n" in mangle
    assert {"*filter\n:dsp-1-new", "*mangle\n:dsp-1-new"} <= {one[-1].partition(" - ")[0] for one in ran}
    assert ran[-1][:5] == ("iptables", "-t", "mangle", "-I", "FORWARD")


def test_bounds_stay_in_place_and_a_kernel_without_them_gets_an_empty_chain(monkeypatch):
    """A new rule counts from 0."""
    firewall = _Firewall(4, "dsp-1", Deadline(5))
    ran = []
    missing = {"hashlimit"}

    def run(program, *arguments, stdin=""):
        ran.append((program, arguments, stdin))
        return not any(one in " ".join([*arguments, stdin]) for one in missing)

    monkeypatch.setattr(firewall, "_run", run)
    firewall.bound()
    assert ran[-1] == ("iptables-restore", ("--noflush",), "*filter\n:dsp-1-new - [0:0]\nCOMMIT\n")
    assert not firewall.can_bound()
    missing.clear()
    assert firewall.can_bound()
    ran.clear()
    firewall.bound()
    assert [arguments[2:4] for _, arguments, _ in ran] == [("-C", "dsp-1-new")] * 2


@pytest.mark.parametrize("leads", [True, False])
def test_docker_s_chain_is_used_only_where_packets_reach_it(monkeypatch, leads):
    """A firewall that was restored before Docker started can have the chain without a jump to it."""
    firewall = _Firewall(4, "dsp-1", Deadline(5))
    ran = []

    def run(*words, stdin=""):
        ran.append(words)
        return "-I" in words or (leads and words[-1] == "DOCKER-USER")

    monkeypatch.setattr(firewall, "_run", run)
    firewall.enter_forward()
    assert ran[-1][3:5] == ("-I", "DOCKER-USER" if leads else "FORWARD")
