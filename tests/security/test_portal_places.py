"""The portal's places are few and anybody may ask for one: nobody keeps the others from signing in."""

from __future__ import annotations

import contextlib
import threading

import pytest

from dispatcher.proxy.edge.routing.settings import COLLECTED, PORTAL_BODY, SMALL_BODY
from tests.support.cases_site import Site
from tests.support.edge_harness import COOKIE, TOKEN, Connection, Edge, Reader, eventually, read_all

SENDERS = 40
PLACES = 16
POST = b"POST /auth/login HTTP/1.1\r\nHost: app.test\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
PAGE = b"GET /auth/login HTTP/1.1\r\nHost: app.test\r\n\r\n"


@pytest.fixture
def edge():
    with Edge(in_flight_per_agent=PLACES, body_timeout=6) as edge:
        yield edge
        eventually(lambda: not edge.worker.clients.open)
        assert (
            not edge.worker.context.collected
            and not edge.worker.clients._portal_slots
            and not edge.worker.context.portal.in_flight
        )
        assert not edge.errors


def sized(length: int, *lines: bytes) -> bytes:
    return POST + b"".join(line + b"\r\n" for line in lines) + b"Content-Length: %d\r\n\r\n" % length


def test_slow_senders_do_not_prevent_sign_ins() -> None:
    """With the real portal and manager: more bodies that do not end than there are places."""
    with Site(proxy=f"in_flight_per_agent = {PLACES}") as site, contextlib.ExitStack() as stack:
        site.add("alice")
        for _ in range(SENDERS):
            sock = stack.enter_context(site.connect())
            sock.sendall(site.head("/auth/login", "", "Content-Length: 200", method="POST") + b"user=alice&")
        for _ in range(3):
            assert site.web("GET", "/auth/login", Accept="text/html").status == 200
        assert "dispatcher=" in site.login("alice")


@pytest.mark.parametrize(
    ("head", "begin", "end"),
    [
        (sized(20), b"user=alice", b"&password="),
        (CHUNKED, b"a\r\nuser=alice\r\na\r\n&pass", b"word=\r\n0\r\n\r\n"),
    ],
    ids=["sized", "chunked"],
)
def test_a_slow_body_arrives_whole_and_what_follows_it_is_another_request(edge, head, begin, end) -> None:
    with edge.connect() as slow, edge.connect() as never:
        never.sendall(head + begin)
        for piece in (head[:30], head[30:], *(begin[at : at + 1] for at in range(len(begin)))):
            slow.sendall(piece)
        eventually(lambda: edge.worker.context.collected == 2 * len(begin))
        assert not edge.portal.heads and not edge.worker.context.portal.in_flight
        slow.sendall(end + PAGE + head + begin + end + PAGE)
        reader = Reader(slow)
        first, second, third, fourth = (reader.answer() for _ in range(4))
        assert b"user=alice" in first.body and first.body.endswith((b"word=", b"word=\r\n0\r\n\r\n"))
        assert second.body.startswith(b"GET ") and fourth.body.startswith(b"GET ")
        assert third.body.partition(b"\r\n\r\n")[2] == first.body.partition(b"\r\n\r\n")[2]
        never.settimeout(20)
        answer = read_all(never)  # what never comes is not waited for
        assert answer.startswith(b"HTTP/1.1 408 ") and b"Connection: close" in answer


def test_a_body_that_is_too_long_or_malformed_is_refused_before_the_portal_sees_it(edge) -> None:
    assert edge.ask(sized(PORTAL_BODY + 1), timeout=3).startswith(b"HTTP/1.1 413 ")
    assert edge.ask(sized(PORTAL_BODY + 1, b"Expect: 100-continue")).startswith(b"HTTP/1.1 413 ")
    long = b"ffff\r\n" + b"x" * 65535 + b"\r\n"
    assert edge.ask(CHUNKED + long + b"ff\r\nx").startswith(b"HTTP/1.1 413 ")
    assert edge.ask(CHUNKED + b"1\r\nx\r\n" * (PORTAL_BODY // 6 + 1)).startswith(b"HTTP/1.1 413 ")
    assert edge.ask(CHUNKED + b"zz\r\n").startswith(b"HTTP/1.1 400 ")
    assert edge.ask(CHUNKED + b"1\r\nxyz\r\n").startswith(b"HTTP/1.1 400 ")
    assert not edge.portal.heads
    with edge.connect() as sock:
        sock.sendall(sized(PORTAL_BODY) + b"y" * PORTAL_BODY)
        assert Reader(sock).answer().body.endswith(b"y" * 1000)


def test_a_body_that_waits_to_be_wanted_is_asked_for(edge) -> None:
    for head, body in (
        (sized(2, b"Expect: 100-continue"), b"ok"),
        (CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n", b"0\r\n\r\n"),
    ):
        with edge.connect() as sock:
            sock.sendall(head)
            assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(body)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert edge.ask(sized(2, b"Expect: 100-continue", b"Connection: close") + b"ok").startswith(b"HTTP/1.1 200 ")
    old = sized(2, b"Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert edge.ask(old, timeout=8).startswith(b"HTTP/1.1 408 ")  # HTTP/1.0 knows no 100 (RFC 9110, 10.1.1)
    assert all(b"expect" not in head.lower() for head in edge.portal.heads)


def test_a_client_that_gives_up_in_the_middle_leaves_nothing_behind(edge) -> None:
    assert edge.ask(sized(20) + b"user", shut=True) == b""
    with edge.connect() as sock:
        sock.sendall(CHUNKED + b"5\r\nab")
        eventually(lambda: edge.worker.context.collected)
    eventually(lambda: not edge.worker.context.collected)
    assert not edge.portal.heads


def test_the_end_of_a_session_does_not_break_a_form_that_is_on_its_way(edge) -> None:
    """As before it was kept: the sign-out itself, say, while another tab signs out."""
    with edge.connect() as sock:
        reader = Reader(sock)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: app.test\r\n" + COOKIE + b"\r\n")
        assert reader.answer().status == 200
        sock.sendall(sized(4, COOKIE.strip()) + b"ab")
        eventually(lambda: edge.worker.context.collected)
        edge.feed.remove(tokens=(TOKEN,))
        eventually(lambda: not edge.worker.context.tables.sessions)
        sock.sendall(b"cd")
        assert reader.answer().body.endswith(b"abcd")


def test_incomplete_bodies_take_bounded_memory_and_small_ones_still_pass(edge, monkeypatch) -> None:
    monkeypatch.setattr(edge.worker.context, "most_collected", 4 * PORTAL_BODY)
    assert COLLECTED >= 4 * PORTAL_BODY
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(edge.connect()) for _ in range(8)]
        for sock in socks:
            sock.sendall(sized(PORTAL_BODY) + b"x" * (PORTAL_BODY - 1))
        refused = 0
        for sock in socks:
            sock.settimeout(0.5)
            refused += read_all(sock).startswith(b"HTTP/1.1 503 ")
        assert refused == 4 and 3 * PORTAL_BODY < edge.worker.context.collected <= 4 * PORTAL_BODY
        with edge.connect() as sock:
            sock.sendall(sized(SMALL_BODY))
            for _ in range(SMALL_BODY // 512):
                sock.sendall(b"s" * 512)
            assert Reader(sock).answer().status == 200


def test_one_address_takes_half_of_the_places_at_most() -> None:
    release = threading.Event()

    def portal(connection: Connection) -> None:
        while connection.head():
            release.wait(60)
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def ask(edge: Edge, address: bytes):
        sock = edge.connect()
        sock.sendall(PAGE[:-2] + b"X-Forwarded-For: " + address + b"\r\n\r\n")
        return sock

    with Edge(portal=portal, in_flight_per_agent=PLACES, trusted_proxies=["127.0.0.0/8"]) as edge:
        with contextlib.ExitStack() as stack:
            greedy = [stack.enter_context(ask(edge, b"192.0.2.1")) for _ in range(PLACES)]
            eventually(lambda: edge.worker.context.portal.in_flight == PLACES // 2)
            refused = 'requests_total{app="edge",class="5xx"}'
            eventually(lambda: edge.worker.context.counters.values().get(refused) == PLACES // 2, 20)
            others = [stack.enter_context(ask(edge, b"192.0.2.%d" % number)) for number in range(2, 6)]
            eventually(lambda: edge.worker.context.portal.in_flight == PLACES // 2 + 4)
            release.set()
            assert all(Reader(sock).answer().status == 200 for sock in others)
            found = sorted(Reader(sock).answer().status for sock in greedy)
            assert found == [200] * (PLACES // 2) + [503] * (PLACES // 2)
            again = stack.enter_context(ask(edge, b"192.0.2.1"))
            assert Reader(again).answer().status == 200, "a place that was given back can be taken again"
        eventually(lambda: not edge.worker.clients._portal_slots)
