"""Firewall rules of the bridge."""

from ipaddress import ip_address, ip_network

from dispatcher_docker.networks import chain


def test_dns_of_a_denied_network_passes_and_nothing_else_of_it():
    """A name server may lie beside the metadata service, as on Azure and Google."""
    servers = [ip_address(one) for one in ("168.63.129.16", "192.0.2.53", "fd00::53")]
    denied = [ip_network("168.63.129.16/32"), ip_network("169.254.0.0/16")]
    assert chain("dsp-1", denied, servers).splitlines() == [
        "*filter",
        ":dsp-1 - [0:0]",
        "-A dsp-1 -d 168.63.129.16 -p udp --dport 53 -j RETURN",
        "-A dsp-1 -d 168.63.129.16 -p tcp --dport 53 -j RETURN",
        "-A dsp-1 -d 168.63.129.16/32 -j REJECT",
        "-A dsp-1 -d 169.254.0.0/16 -j REJECT",
        "-A dsp-1 -o dsp-1 -j REJECT",
        "COMMIT",
    ]
