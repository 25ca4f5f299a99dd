"""What a client or an agent could make the edge do."""

from __future__ import annotations

import pytest

from dispatcher.proxy.edge.http.response import Policy, parse_response
from tests.support.edge_harness import COOKIE, Edge, eventually

GUARDED = Policy(b"/auth/")


@pytest.fixture(scope="module")
def edge():
    with Edge(trusted_proxies=["127.0.0.0/8"]) as edge:
        yield edge


def ask(edge, target: bytes, host: bytes = b"app.test", more: bytes = b"") -> bytes:
    return edge.ask(b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n%b%b\r\n" % (target, host, COOKIE, more))


@pytest.mark.parametrize(
    "query",
    [b"&".join([b"a=1"] * 50), b"&" * 2000, b"agent=alice&agent=" + b"%ff" * 50],
    ids=["many", "empty", "twice"],
)
def test_an_event_stream_with_an_odd_query_is_refused_in_words(edge, query) -> None:
    answer = ask(edge, b"/auth/events?" + query)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.1 200 ")), answer[:60]
    assert not edge.errors


def test_what_a_trusted_proxy_said_does_not_outlive_its_connection(edge) -> None:
    """Connection objects are used again, and with them what the last header lines meant."""
    lines = b"X-Forwarded-For: 192.0.2.66\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: spoofed.test\r\n"
    assert b"Host: spoofed.test" in ask(edge, b"/a", more=lines)
    eventually(lambda: edge.worker.clients.spare)
    assert b"spoofed" not in ask(edge, b"/a")


@pytest.mark.parametrize(
    "line",
    [
        b'NEL: {"report_to":"x","max_age":31536000,"success_fraction":1}',
        b'Report-To: {"group":"x","max_age":31536000,"endpoints":[{"url":"https://evil.test/"}]}',
    ],
)
def test_an_agent_has_nobody_told_of_every_request_to_the_host(line) -> None:
    """Network error logging counts for the whole origin, portal included, and outlives the session."""
    head = b"HTTP/1.1 200 OK\r\n%b\r\nContent-Length: 0\r\n\r\n" % line
    assert line.split(b":")[0] not in parse_response(head, 100, b"GET", GUARDED).lines


@pytest.mark.parametrize(
    "kind", [b"text/javascript", b"Application/X-JavaScript; charset=utf-8", b"text/jscript", b"text/ecmascript"]
)
def test_a_cached_script_cannot_become_a_service_worker_unseen(kind) -> None:
    """With ``updateViaCache: 'all'`` a first registration may take a script from the browser's cache (Service Workers,
    "Update"), where the edge does not see it; the copy in the cache must then be one that was asked for as a worker.
    """
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nCache-Control: max-age=9\r\nContent-Length: 0\r\n\r\n" % kind
    assert b"Vary: Service-Worker" in parse_response(head, 100, b"GET", GUARDED).lines
    own = Policy(host_only=True)  # an origin of its own: nothing to guard
    assert b"Vary: Service-Worker" not in parse_response(head, 100, b"GET", own).lines
    page = head.replace(kind, b"text/html")
    assert b"Vary: Service-Worker" not in parse_response(page, 100, b"GET", GUARDED).lines
