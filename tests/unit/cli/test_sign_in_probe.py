"""What tells `serve` and `demo` that people can sign in, and the proxy that its children never will."""

import os
import socket
import ssl
import threading

import pytest

from dispatcher.config.load import parse
from dispatcher.cli.serve import sign_in_page_answers
from dispatcher.plugin.errors import Unavailable
from dispatcher.plugin.model import Endpoint
from dispatcher.proxy.children import FIRST_TRIES, PORTAL, BackOff, Child
from tests.support.certificates import Authority


@pytest.fixture
def door():
    """Answer one connection with these bytes; returns the endpoint and what was asked."""
    threads, sockets, asked = [], [], []

    def door(answer, context=None):
        sock = socket.create_server(("127.0.0.1", 0))
        sockets.append(sock)

        def serve():
            client, _ = sock.accept()
            if context:
                client = context.wrap_socket(client, server_side=True)
            with client:
                while b"\r\n\r\n" not in (asked or [b""])[0][16:]:
                    asked[:] = [(asked or [b""])[0] + client.recv(4096)]
                client.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return Endpoint.tcp("127.0.0.1", sock.getsockname()[1]), asked

    yield door
    for thread in threads:
        thread.join(10)
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize(
    ("answer", "open_"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 303 See Other\r\n\r\n", True),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", False),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"", False),
    ],
)
def test_an_answer_of_the_portal_means_that_people_can_sign_in(door, answer, open_):
    endpoint, asked = door(answer)
    proxy = parse({"proxy": {"prefix": "/in"}}).proxy
    assert sign_in_page_answers(endpoint, proxy, "http://apps.example.org/") is open_
    assert asked[0].startswith(b"GET /in/login HTTP/1.1\r\nHost: apps.example.org\r\n")


def test_where_nobody_listens_nobody_signs_in(free_port):
    assert not sign_in_page_answers(Endpoint.tcp("127.0.0.1", free_port), parse({}).proxy, "")


def test_a_front_proxy_s_protocol_is_spoken(door):
    endpoint, asked = door(b"HTTP/1.1 200 OK\r\n\r\n")
    assert sign_in_page_answers(endpoint, parse({"proxy": {"proxy_protocol": True}}).proxy, "")
    assert asked[0].startswith(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0GET /auth/login ")


def test_its_own_certificate_need_not_be_trusted_here(door, tmp_path):
    cert, key = Authority(tmp_path).issue("door", ["apps.example.org"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    endpoint, _ = door(b"HTTP/1.1 200 OK\r\n\r\n", context)
    proxy = parse({"proxy": {"tls_cert": str(cert), "tls_key": str(key)}}).proxy
    assert sign_in_page_answers(endpoint, proxy, "https://apps.example.org/")


EXIT_1, KILLED = 1 << 8, 9  # wait statuses


@pytest.fixture
def child(monkeypatch):
    """A child that lived for so many seconds."""
    now = [1000.0]
    monkeypatch.setattr("dispatcher.proxy.children.boottime", lambda: now[0])
    ours, theirs = socket.socketpair()

    def child(lived):
        made = Child(PORTAL, 1, os.getpid(), ours, started=now[0])
        now[0] += lived
        return made

    yield child
    ours.close()
    theirs.close()


def test_children_that_all_end_at_once_are_not_tried_for_ever(child):
    back_off = BackOff()
    pauses = [back_off.ended(child(0.2), EXIT_1) for _ in range(FIRST_TRIES - 1)]
    assert pauses == sorted(pauses)
    with pytest.raises(Unavailable, match="its portal ended at once, 5 times in a row"):
        back_off.ended(child(0.2), EXIT_1)


@pytest.mark.parametrize(("lived", "status"), [(30.0, EXIT_1), (6.0, EXIT_1), (0.2, KILLED)])
def test_one_that_served_or_was_killed_is_replaced_for_ever(child, lived, status):
    back_off = BackOff()
    back_off.ended(child(lived), status)
    for _ in range(3 * FIRST_TRIES):
        back_off.ended(child(0.2), EXIT_1 if lived > 1 else KILLED)
