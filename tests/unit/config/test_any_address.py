"""Listening on all addresses: [::] alone takes IPv4 as well, and leaves it to 0.0.0.0 where both are named."""

import contextlib
import socket

import pytest

from dispatcher.manager.rest.listeners import tcp_socket
from dispatcher.proxy.listeners import Listeners
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.options import takes_ipv4


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def proxy(addresses):
    listeners = Listeners()
    listeners.update({"proxy.listen": addresses})
    return listeners.of("proxy.listen")


def manager(addresses, beside=None):
    made = []
    try:
        for address in addresses:
            made.append(tcp_socket(address, beside or addresses))
            made[-1].listen()
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made


def reachable(port):
    """Return over which families somebody answers."""
    found = set()
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family) as sock:
            sock.connect((host, port))
            found.add(family.name)
    return found


@pytest.mark.parametrize("opened", [proxy, manager])
@pytest.mark.parametrize(
    ("addresses", "families"),
    [
        (["0.0.0.0:{}", "[::]:{}"], {"AF_INET", "AF_INET6"}),
        (["[::]:{}", "0.0.0.0:{}"], {"AF_INET", "AF_INET6"}),
        (["[::]:{}"], {"AF_INET", "AF_INET6"}),
        (["[::1]:{}"], {"AF_INET6"}),
        (["0.0.0.0:{}"], {"AF_INET"}),
    ],
)
def test_each_family_is_served_as_it_is_written(opened, addresses, families, free_port):
    sockets = opened([address.format(free_port) for address in addresses])
    try:
        assert len(sockets) == len(addresses)
        assert reachable(free_port) == families
    finally:
        for sock in sockets:
            sock.close()


def test_a_listener_that_a_reload_adds_knows_of_those_there_are(free_port):
    four, six = f"0.0.0.0:{free_port}", f"[::]:{free_port}"
    listeners = Listeners()
    try:
        listeners.update({"proxy.listen": [four]})
        listeners.update({"proxy.listen": [four, six]})
        assert reachable(free_port) == {"AF_INET", "AF_INET6"}
    finally:
        listeners.close()


def test_another_port_is_another_matter():
    assert takes_ipv4("[::]:443", ["[::]:443", "0.0.0.0:80"])
    assert not takes_ipv4("[::]:443", ["[::]:443", "0.0.0.0:443"])
    assert not takes_ipv4("[2001:db8::1]:443", [])


def test_a_name_that_users_open_is_no_address_of_this_host():
    with pytest.raises(ConfigError, match=r"not an address of this host.*proxy\.public_url"):
        proxy(["apps.example.invalid:8080"])
