"""One client has many addresses, and many ways in: it is counted as one all the same."""

from __future__ import annotations

import contextlib
import socket
import ssl

import pytest

from dispatcher.common.ip_limits import network
from dispatcher.proxy.edge.net.handshakes import Handshakes
from dispatcher.proxy.edge.net.listener import Listener
from tests.support.certificates import Authority
from tests.support.edge_harness import Edge, eventually


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::ffff", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("", ""),
        ("unknown", "unknown"),
        ("::::", "::::"),
    ],
)
def test_an_ipv6_address_stands_for_its_network(address, found) -> None:
    assert network(address) == found


def test_connections_from_one_ipv6_network_are_counted_together() -> None:
    with Edge(connections_per_address=2) as edge:

        def enter(*addresses: str) -> list[bool]:
            return edge.do(lambda: [edge.worker.clients.opened(address, exempt=False) for address in addresses])

        assert enter("2001:db8::1", "2001:db8::2", "2001:db8::3") == [True, True, False]
        assert enter("2001:db8:0:1::1", "192.0.2.1") == [True, True]
        edge.do(lambda: [edge.worker.clients.closed(f"2001:db8::{number}") for number in (1, 2, 3)])
        assert enter("2001:db8::4") == [True]
        edge.do(
            lambda: [edge.worker.clients.closed(each) for each in ("2001:db8::4", "2001:db8:0:1::1", "192.0.2.1")]
        )
        assert edge.worker.clients.open == 0 and not edge.worker.clients._addresses


def test_the_listener_that_redirects_counts_its_connections_too() -> None:
    with Edge(connections=16, public_url="https://apps.test") as edge:
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        listener = Listener(edge.worker.clients, sock, to_https=True)
        edge.do(listener.start)
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(16)]
            eventually(lambda: edge.worker.clients.open == 16)
            late = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            with contextlib.suppress(ConnectionResetError):
                assert late.recv(4096)[:12] in {b"", b"HTTP/1.1 503"}
            idle[0].sendall(b"GET /x HTTP/1.1\r\nHost: apps.test\r\n\r\n")
            assert b"Location: https://apps.test/x" in idle[0].recv(4096)
        eventually(lambda: edge.worker.clients.open == 0)
        edge.do(listener.close)


@pytest.mark.parametrize(("header", "known"), [(False, True), (False, False), (True, True)])
def test_connections_that_never_finish_their_handshake_are_bounded(tmp_path, header, known) -> None:
    """They hold a descriptor each, and are no clients yet: nothing else counts them."""
    certificate, key = Authority(tmp_path).issue("server", ["127.0.0.1"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    most = 16 if known else 8  # in all, or of one address
    with Edge(connections=64, connections_per_address=32, head_timeout=3) as edge, contextlib.ExitStack() as stack:
        if not known:
            edge.worker.clients.proxies._peers["127.0.0.1"] = (b"192.0.2.1", False, False)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        port = sock.getsockname()[1]
        listener = Handshakes(edge.worker.clients, sock, None if header else tls, header=header)
        edge.do(listener.start)
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(most)]
        eventually(lambda: edge.worker.clients.handshakes == most)
        with socket.create_connection(("127.0.0.1", port), 5) as late, contextlib.suppress(ConnectionResetError):
            assert late.recv(1) == b""
        silent[0].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b"", "given up after head_timeout"
        eventually(lambda: edge.worker.clients.handshakes == 0)
        assert not edge.worker.clients._handshakes and edge.worker.clients.open == 0
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
        if header:
            client.sendall(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")
        else:
            client = stack.enter_context(trusting.wrap_socket(client))
        client.sendall(b"GET /auth/login HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        eventually(lambda: edge.worker.clients.handshakes == 0)
        edge.do(listener.close)
