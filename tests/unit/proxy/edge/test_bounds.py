"""The edge's work is linear in the size of a request, and what it caches of clients' input is bounded."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
import tracemalloc
from collections.abc import Callable

import pytest

from dispatcher.config.load import parse
from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.cookie import SessionCookie
from dispatcher.proxy.edge.http.field_names import COOKIE, BadHead
from dispatcher.proxy.edge.http.head_reader import HeadReader
from dispatcher.proxy.edge.http.request import parse_request, upstream_head
from dispatcher.proxy.edge.http.response import Policy, client_head, parse_response
from dispatcher.proxy.edge.http.trusted_proxies import TrustedProxies
from dispatcher.proxy.edge.http.websocket import Scanner
from dispatcher.proxy.edge.routing.router import Router
from dispatcher.proxy.edge.routing.settings import Settings
from dispatcher.proxy.edge.routing.table import Tables
from tests.support.edge_feed import agent_row, session_row

MANY = 1 << 20  # header fields, so that only bytes are a limit
TOKEN = "token-of-alice-0123456789abcdefghijklmnopqr"
GET = b"GET / HTTP/1.1\r\nHost: alice.apps.test\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
NUMBERS = itertools.count(10_000_000)


class Path:
    """A request's way through parser, router and header rules, and the answer's way back, without connections."""

    def __init__(self, **proxy: object) -> None:
        self.settings = Settings(parse({"proxy": {"trusted_proxies": ["10.0.0.0/8"], **proxy}}))
        self.tables = Tables()
        self.router = Router(self.settings, self.tables)
        row = {**session_row(TOKEN, "alice"), "host": "alice.apps.test" if self.settings.subdomain else ""}
        agents = [agent_row("alice", "tcp:127.0.0.1:9", label="alice")]
        self.tables.apply({"type": "change", "agents": agents, "sessions": [row]}, 0.0)
        self.session = next(iter(self.tables.sessions.values()))
        self.proxies = TrustedProxies(self.settings.trusted, unix=False, scheme=b"http")
        self.cookie = SessionCookie(b"dispatcher")

    def request(self, head: bytes) -> None:
        request = parse_request(head, MANY)
        self.proxies.client_of("10.0.0.1", request.fields)
        self.cookie.read(request.fields.get(COOKIE, b""))
        for session in (self.session, None):
            self.router.route(request, session, 1.0, b"http", b"")
        upstream_head(request, request.host, self.cookie.others, b"192.0.2.1", b"http", b"", b"id")

    def answer(self, head: bytes) -> None:
        for policy in (Policy(b"/auth/"), Policy(host_only=True)):
            client_head(parse_response(head, MANY, b"GET", policy), b"")


SHARED = Path()
SUBDOMAIN = Path(routing="subdomain", public_url="http://apps.test")


def both(head: bytes) -> None:
    for path in (SHARED, SUBDOMAIN):
        path.request(head)


def to(part: bytes, size: int) -> bytes:
    return part * (size // len(part))


def unseen(size: int) -> bytes:
    """Return lines whose names no parser has in its cache."""
    return b"".join(b"X-%08d: a\r\n" % next(NUMBERS) for _ in range(size // 15))


def in_pieces(take: Callable[[bytes], object], data: bytes, size: int = 7) -> None:
    for start in range(0, len(data), size):
        take(data[start : start + size])


def trickled(head: bytes) -> None:
    assert in_pieces(HeadReader(MANY, MANY).read, head) is None


def pipelined(request: bytes, size: int) -> None:
    reader = HeadReader(MANY, MANY)
    reader.keep(to(request, size))
    while reader.kept is not None:
        assert reader.read_kept() is not None


COSTS: dict[str, Callable[[int], object]] = {
    "labels": lambda n: both(b"GET / HTTP/1.1\r\nHost: " + to(b"a.", n) + b"apps.test\r\n\r\n"),
    "segments": lambda n: both(b"GET " + to(b"/a", n) + b" HTTP/1.1\r\nHost: alice.apps.test\r\n\r\n"),
    "dots": lambda n: both(b"GET /auth" + to(b"/..", n) + b" HTTP/1.1\r\nHost: alice.apps.test\r\n\r\n"),
    "queries": lambda n: both(b"GET /" + to(b"?a=12345&", n) + b" HTTP/1.1\r\nHost: alice.apps.test\r\n\r\n"),
    "cookies": lambda n: both(GET + b"Cookie: dispatcher=x; " + to(b"a=b; ", n) + b"\r\n\r\n"),
    "near names": lambda n: both(GET + b"Cookie: " + to(b"xdispatcher=b; ", n) + b"\r\n\r\n"),
    "own names": lambda n: both(GET + b"Cookie: " + to(b"dispatcher=b; ", n) + b"\r\n\r\n"),
    "one name": lambda n: both(GET + b"Cookie: " + to(b"dispatcher", n) + b"\r\n\r\n"),
    "names": lambda n: both(GET + unseen(n) + b"\r\n"),
    "dropped": lambda n: both(GET + to(b"X-Forwarded-A: b\r\nX-A: b\r\n", n) + b"\r\n"),
    "options": lambda n: both(GET + b"Connection: " + to(b"close, a, ", n) + b"\r\n\r\n"),
    "addresses": lambda n: both(GET + b"X-Forwarded-For: " + to(b"10.0.0.1, ", n) + b"\r\n\r\n"),
    "pieces of a head": lambda n: trickled(GET + to(b"X-A: b\r\n", n) + b"\r\n"),
    "further requests": lambda n: pipelined(GET + b"\r\n", n),
    "further bodies": lambda n: pipelined(GET + b"Content-Length: 3\r\n\r\nabc", n),
    "lengths": lambda n: SHARED.answer(OK + b"Content-Length: " + to(b"5, ", n) + b"5\r\n\r\n"),
    "set cookies": lambda n: SHARED.answer(OK + to(b"Set-Cookie: dispatcher=a; Domain=b\r\n", n) + b"\r\n"),
    "domains": lambda n: SHARED.answer(OK + b"Set-Cookie: a=b" + to(b"; domain=b", n) + b"\r\n\r\n"),
    "directives": lambda n: SHARED.answer(OK + b"Cache-Control: " + to(b"public, a, ", n) + b"\r\n\r\n"),
    "caches": lambda n: SHARED.answer(OK + to(b"Cache-Control: a\r\nX-A: b\r\n", n) + b"\r\n"),
    "chunks": lambda n: Chunked().feed(to(b"1\r\na\r\n", n)),
    "extensions": lambda n: Chunked().feed(to(b"9;a=b\r\n123456789\r\n", n)),
    "pieces of chunks": lambda n: in_pieces(Chunked().feed, to(b"1\r\na\r\n", n)),
    "frames": lambda n: Scanner().scan(to(b"\x82\x81\0\0\0\0a", n)),
}


@pytest.mark.parametrize("kind", COSTS)
def test_work_grows_with_the_bytes_and_not_faster(kind):
    run = COSTS[kind]
    run(4096)

    def seconds(size: int) -> float:
        start = time.process_time()
        run(size)
        return time.process_time() - start

    size = 8192
    few, many = (min(seconds(each) for _ in range(3)) for each in (size, 8 * size))
    # Eight times the bytes: work by the square would be 64 times as much.
    assert many < 24 * few + 0.002, (few, many)


def test_nothing_learned_from_strangers_is_kept_for_ever():
    path = Path()

    def strangers(first: int, count: int) -> None:
        for n in range(first, first + count):
            for address in range(4 * n, 4 * n + 4):
                path.proxies.peer(f"2001:db8::{address:x}")
            path.request(
                b"GET /%d?%d HTTP/1.1\r\nHost: h%d.test\r\nX-%d: a\r\nx_forwarded_%d: b\r\nAccept: a/%d\r\n"
                b"Cookie: dispatcher=%043d; a=%d\r\n\r\n" % (n, n, n, n, n, n, n, n)
            )
            path.answer(
                b"HTTP/1.1 200 Reason %d\r\nCache-Control: max-age=%d, a%d\r\nY-%d: b\r\nSet-Cookie: c%d=d\r\n"
                b"Content-Length: %d\r\n\r\n" % (n, n, n, n, n, n)
            )
            with contextlib.suppress(BadHead):
                path.request(b"GET%d / HTTP/1.1\r\nHost: a\r\n\r\n" % n)

    def kept() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    strangers(0, 1100)  # the limits of all caches are lower
    tracemalloc.start()
    try:
        before = kept()
        strangers(1100, 700)
        once = kept()
        strangers(1800, 1400)
        assert kept() < once + 100_000, (before, once, kept())
    finally:
        tracemalloc.stop()
