"""The edge's reading and writing of HTTP/1.1, without a socket; h11 is the independent judge."""

from __future__ import annotations

import os
import random
import re

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.proxy.edge.http.field_names import BadHead, REQUEST_NAMES
from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.request import CHUNKED, parse_request, upstream_head
from dispatcher.proxy.edge.http.response import Policy, client_head, parse_response, sets_own_cookie, widens

HOST = b"Host: app.test\r\n"
#: How much longer to fuzz than in the tests of every day.
LONGER = int(os.environ.get("EDGE_FUZZ", "1"))
pytestmark = pytest.mark.timeout(300 * LONGER)


def request(head: bytes):
    return parse_request(head, 100)


def judged(head: bytes) -> h11.Request:
    """Return what h11 makes of a head that the edge would send, and fail if it does not like it."""
    judge = h11.Connection(h11.SERVER)
    judge.receive_data(head)
    event = judge.next_event()
    assert isinstance(event, h11.Request), event
    return event


def sent(parsed) -> bytes:
    return upstream_head(parsed, parsed.host, b"", b"192.0.2.1", b"http", b"", b"id")


REFUSED = {
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "the same host twice": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "empty host": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "junk host": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "host with a path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "host with a user": (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    "host with a comma": (b"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", 400),
    "absolute form of another host": (b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "absolute form of another scheme": (b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "authority form": (b"GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "asterisk with GET": (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "CL and TE": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "TE and CL": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
    "two CLs": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    "two equal CLs": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
    "a list of CLs": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n", 400),
    "signed CL": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n", 400),
    "negative CL": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", 400),
    "hexadecimal CL": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n", 400),
    "huge CL": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
    "underscored CL": (b"POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 5\r\n\r\n", 400),
    "digits of another script": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \xd9\xa5\r\n\r\n", 400),
    "xchunked": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 400),
    "gzip, chunked": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
    "chunked, identity": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n", 400),
    "chunked twice": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "two TEs": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "identity": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", 501),
    "quoted chunked": (b'POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: "chunked"\r\n\r\n', 400),
    "TE in HTTP/1.0": (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "dotted TE": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer.Encoding: chunked\r\n\r\n", 400),
    "underscored TE": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer_Encoding: chunked\r\n\r\n", 400),
    "obs-fold": (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\n c\r\n\r\n", 400),
    "obs-fold with a tab": (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\n\tc\r\n\r\n", 400),
    "fold on the first line": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "bare LF": (b"GET / HTTP/1.1\r\nHost: a\nX-A: b\r\n\r\n", 400),
    "bare LF at the start line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    "bare CR": (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\rX-B: c\r\n\r\n", 400),
    "bare CR in the target": (b"GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "NUL in a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\0c\r\n\r\n", 400),
    "NUL in a name": (b"GET / HTTP/1.1\r\nHost: a\r\nX\0A: b\r\n\r\n", 400),
    "NUL in the target": (b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "DEL in a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: \x7f\r\n\r\n", 400),
    "space before the colon": (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n", 400),
    "tab before the colon": (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\t: chunked\r\n\r\n", 400),
    "no colon": (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length\r\n\r\n", 400),
    "empty name": (b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400),
    "name with a bracket": (b"GET / HTTP/1.1\r\nHost: a\r\nX(A): b\r\n\r\n", 400),
    "name beyond ASCII": (b"GET / HTTP/1.1\r\nHost: a\r\nX\xe9: b\r\n\r\n", 400),
    "lower-case method": (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "mixed-case method": (b"Post / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "unknown method": (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "RTSP method": (b"DESCRIBE / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "ICE method": (b"SOURCE / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "CONNECT": (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
    "http/1.1": (b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    "HTTP/1.1x": (b"GET / HTTP/1.1x\r\nHost: a\r\n\r\n", 400),
    "ICAP": (b"GET / ICAP/1.0\r\nHost: a\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a space in the target": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a tab in the start line": (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a trailing space": (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    "a fragment": (b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a byte beyond ASCII in the target": (b"GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "an upgrade with a body": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\n", 400),
    "an odd expectation": (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\nContent-Length: 5\r\n\r\n", 417),
    "too many fields": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 100 + b"\r\n", 431),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_two_parsers_could_read_differently_is_refused(name):
    head, status = REFUSED[name]
    with pytest.raises(BadHead) as caught:
        request(head)
    assert caught.value.status == status
    # And again: what was learned the first time must not let it through.
    with pytest.raises(BadHead):
        request(head)


def test_a_cached_line_is_not_mistaken_for_another():
    for value in (b"chunked", b"xchunked", b"chunked", b"identity"):
        head = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: " + value + b"\r\n\r\n"
        if value == b"chunked":
            assert request(head).length == CHUNKED
        else:
            with pytest.raises(BadHead):
                request(head)


def test_upgrades_that_are_no_websockets_are_ignored():
    for value in (b"h2c", b"websocket, h2c", b"TLS/1.2", b"tcp"):
        parsed = request(
            b"GET / HTTP/1.1\r\n"
            + HOST
            + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: "
            + value
            + b"\r\nHTTP2-Settings: AA\r\n\r\n"
        )
        assert not parsed.upgrade
        assert b"pgrade" not in sent(parsed) and b"HTTP2" not in sent(parsed)
    assert not request(b"GET / HTTP/1.0\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n").upgrade
    assert not request(b"GET / HTTP/1.1\r\n" + HOST + b"Upgrade: websocket\r\n\r\n").upgrade
    assert request(
        b"GET / HTTP/1.1\r\n" + HOST + b"Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n\r\n"
    ).upgrade


def test_te_trailers_is_said_again_and_other_codings_are_not():
    parsed = request(b"GET / HTTP/1.1\r\n" + HOST + b"TE: trailers, deflate;q=0.5\r\nConnection: TE\r\n\r\n")
    assert b"\r\nConnection: TE\r\nTE: trailers\r\n" in sent(parsed) and b"deflate" not in sent(parsed)


@pytest.mark.parametrize("connection,version,close", [
    (b"", b"1.1", False), (b"close", b"1.1", True), (b"Close", b"1.1", True), (b"keep-alive, close", b"1.1", True),
    (b"", b"1.0", True), (b"keep-alive", b"1.0", False), (b"keep-alive, close", b"1.0", True),
])  # fmt: skip
def test_persistence(connection, version, close):
    line = b"Connection: " + connection + b"\r\n" if connection else b""
    assert request(b"GET / HTTP/" + version + b"\r\n" + HOST + line + b"\r\n").close is close


TOKENS = st.sampled_from(
    [
        b"X-A",
        b"Accept",
        b"content-length",
        b"Transfer-Encoding",
        b"Host",
        b"Connection",
        b"Cookie",
        b"X_B",
        b"Expect",
        b"Upgrade",
        b"TE",
    ]
)
VALUES = st.sampled_from(
    [
        b"a",
        b"5",
        b"0",
        b"chunked",
        b"a, b",
        b"close",
        b" x ",
        b"app.test",
        b"\xe9",
        b"keep-alive",
        b"websocket",
        b"",
        b"100-continue",
    ]
) | st.binary(max_size=6)
LINES = st.tuples(TOKENS, st.sampled_from([b": ", b":", b" :", b":\t"]), VALUES).map(b"".join)
STARTS = st.sampled_from(
    [
        b"GET / HTTP/1.1",
        b"POST /a?b HTTP/1.1",
        b"HEAD /%20 HTTP/1.0",
        b"OPTIONS * HTTP/1.1",
        b"PUT //x HTTP/1.1",
        b"DELETE /;a HTTP/1.1",
    ]
)


@settings(max_examples=300 * LONGER, deadline=None)
@given(STARTS, st.lists(LINES, max_size=6), st.booleans())
def test_h11_parses_accepted_heads_in_the_same_way(start, lines, with_host):
    if with_host:
        lines = [b"Host: app.test", *lines]
    head = b"\r\n".join([start, *lines]) + b"\r\n\r\n"
    if head.count(b"\r\n\r\n") > 1:
        return
    try:
        parsed = request(head)
    except BadHead:
        return
    before = judged(head)
    after = judged(sent(parsed))
    assert after.method == before.method == parsed.method
    assert after.target == parsed.target
    fields = dict(after.headers)
    if parsed.length == CHUNKED:
        assert fields[b"transfer-encoding"] == b"chunked" and b"content-length" not in fields
    else:
        assert b"transfer-encoding" not in fields and int(fields.get(b"content-length", 0)) == parsed.length
    assert [name for name, _ in after.headers].count(b"host") == 1
    assert int(dict(before.headers).get(b"content-length", 0)) == max(parsed.length, 0)


@settings(max_examples=300 * LONGER, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_break_the_parser(noise):
    for head in (noise + b"\r\n\r\n", b"GET / HTTP/1.1\r\n" + HOST + noise + b"\r\n\r\n"):
        cut = head.find(b"\r\n\r\n") + 4
        try:
            parsed = request(head[:cut])
        except BadHead:
            continue
        judged(sent(parsed))


@settings(max_examples=200 * LONGER, deadline=None)
@given(st.integers(0, 10**9))
def test_mutated_requests_never_break_the_parser(seed):
    rng = random.Random(seed)
    head = bytearray(
        b"POST /a/b?c=d HTTP/1.1\r\nHost: app.test\r\nContent-Length: 12\r\nCookie: dispatcher=x; a=b\r\nAccept: */*\r\n\r\n"
    )
    for _ in range(rng.randint(1, 4)):
        head[rng.randrange(len(head))] = rng.randrange(256)
    cut = head.find(b"\r\n\r\n") + 4
    if cut < 4:
        return
    try:
        parsed = request(bytes(head[:cut]))
    except BadHead:
        return
    before, after = judged(bytes(head[:cut])), judged(sent(parsed))
    assert after.method == before.method


# Answers.

BAD_ANSWERS = {
    "two CLs": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "unequal CLs in one line": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n",
    "CL and TE": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "junk length": b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\n",
    "TE identity": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
    "TE gzip, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "TE twice": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "TE in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\n\r\n",
    "HTTP/0.9": b"hello\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "a control byte in the reason": b"HTTP/1.1 200 O\x01K\r\n\r\n",
    "a bare CR in the reason": b"HTTP/1.1 200 O\rK\r\n\r\n",
    "a bare LF": b"HTTP/1.1 200 OK\r\nX-A: b\nSet-Cookie: c\r\n\r\n",
    "a NUL": b"HTTP/1.1 200 OK\r\nX-A: \0\r\n\r\n",
    "a folded line": b"HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nX-A\r\n\r\n",
    "no name": b"HTTP/1.1 200 OK\r\n : 5\r\n\r\n",
    "100 with a length": b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n",
    "underscored TE": b"HTTP/1.1 200 OK\r\nTransfer_Encoding: chunked\r\n\r\n",
    "too many fields": b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 101 + b"\r\n",
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_answers_that_must_not_be_passed_on(name):
    for _ in range(2):
        with pytest.raises(BadHead):
            parse_response(BAD_ANSWERS[name], 100, b"GET", Policy())


def test_the_reason_names_the_header_at_fault():
    for name, word in (("two CLs", "Content-Length"), ("TE identity", "Transfer-Encoding"), ("no colon", "colon")):
        with pytest.raises(BadHead) as raised:
            parse_response(BAD_ANSWERS[name], 100, b"GET", Policy())
        assert word in raised.value.why
    with pytest.raises(BadHead, match=re.escape("('X@A')")):
        parse_response(b"HTTP/1.1 200 OK\r\nX@A: b\r\n\r\n", 100, b"GET", Policy())


@pytest.mark.parametrize("lines", [b"Content-Length: 5\r\ncontent-length: 5\r\n", b"Content-Length: 5, 5\r\n"])
def test_equal_lengths_are_one(lines):
    """RFC 9112, 6.3: replaced by the one value."""
    parsed = parse_response(b"HTTP/1.1 200 OK\r\nA: b\r\n" + lines + b"\r\n", 100, b"GET", Policy())
    assert parsed.length == 5
    assert client_head(parsed, b"") == b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 5\r\n\r\n"


@pytest.mark.parametrize(
    ("lines", "cached"),
    [
        (b"Cache-Control: public, max-age=99999\r\n", b"max-age=99999"),
        (b"cache-control: PUBLIC\r\nCACHE-CONTROL: s-maxage=9,no-store\r\n", b"no-store"),
        (b'Cache-Control: private="a, b", no-cache="c, d", x="public\r\n', b"no-cache"),
        (b"Cache-Control: \r\n", b""),
    ],
)
def test_what_an_agent_says_to_caches_is_joined_with_the_edges_own(lines, cached):
    head = b"HTTP/1.1 200 OK\r\nA: b\r\n" + lines + b"Content-Length: 0\r\n\r\n"
    for policy in (Policy(b"/auth/"), Policy(host_only=True)):
        parsed = parse_response(head, 100, b"GET", policy)
        assert parsed.cached == cached and b"cache-control" not in parsed.lines.lower()
    portal = parse_response(head, 100, b"GET", None)
    assert not portal.cached and lines in portal.lines


SHARED, SEPARATE = Policy(b"/auth/"), Policy(host_only=True)


def passed(name: str, policy: Policy) -> bool:
    head = b"HTTP/1.1 200 OK\r\nA: b\r\n%b: 1\r\nContent-Length: 0\r\n\r\n" % name.encode()
    lines = parse_response(head, 100, b"GET", policy).lines
    return b"\r\n%b: 1\r\n" % name.encode() in lines


@pytest.mark.parametrize(
    "name",
    [
        *("CDN-Cache-Control", "cdn-cache-control", "Cloudflare-CDN-Cache-Control", "Vercel-CDN-Cache-Control"),
        *("Some-Cache-Control", "SOME_CDN_CACHE_CONTROL", "A" * 70 + "-Cache-Control", "X-Accel-Expires"),
        *("CF-Edge-Cache", "cf-edge-cache", "CF_Edge_Cache", "Expires", "expires"),
    ],
)
@pytest.mark.parametrize("policy", [SHARED, SEPARATE], ids=["session", "subdomain"])
def test_an_agent_says_nothing_to_one_kind_of_caches(name, policy):
    assert not passed(name, policy)


@pytest.mark.parametrize("policy", [SHARED, SEPARATE], ids=["session", "subdomain"])
@pytest.mark.parametrize(
    "name",
    [
        *("X-Accel-Redirect", "X_Accel_Redirect", "x-accel-redirect", "X-Accel-Limit-Rate", "X-Accel-Charset"),
        *("X-Sendfile", "X-Sendfile2", "X-Sendfile-Temporary", "X-LIGHTTPD-send-file", "X-Lighttpd-Send-Tempfile"),
        *(
            "X-LiteSpeed-Location",
            "X-LiteSpeed-Cache-Control",
            "X-LiteSpeed-Purge",
            "X-Reproxy-URL",
            "X-Reproxy-File",
        ),
        *("X-Envoy-Immediate-Health-Check-Fail", "Surrogate-Control", "surrogate-control", "Edge-Control"),
    ],
)
def test_an_agent_commands_no_front_proxy(name, policy):
    assert not passed(name, policy)


@pytest.mark.parametrize("policy", [SHARED, SEPARATE], ids=["session", "subdomain"])
@pytest.mark.parametrize("name", ["X-Accel-Buffering", "X-Accelerated", "Cache-Control-Hint", "X-Cache", "A" * 70])
def test_fields_of_similar_names_pass(name, policy):
    assert passed(name, policy)


@pytest.mark.parametrize(
    ("lines", "cached"),
    [
        (b"Expires: Wed, 21 Oct 2026 07:28:00 GMT", b"max-age=60"),
        (b"Cache-Control: public\r\nExpires: Wed, 21 Oct 2026 08:27:00 GMT", b"max-age=3600"),
        (b"Cache-Control: max-age=5, public\r\nExpires: Wed, 21 Oct 2099 07:28:00 GMT", b"max-age=5"),
        (b"Cache-Control: No-Store\r\nExpires: Wed, 21 Oct 2099 07:28:00 GMT", b"No-Store"),
        (b"Cache-Control: must-revalidate\r\nExpires: 0", b"must-revalidate, max-age=0"),
        (b"Expires: Wed, 21 Oct 2020 07:28:00 GMT", b"max-age=0"),
        (b"Expires: Wed, 99 Oct 2026 99:99:99 GMT", b"max-age=7074819"),
        (b"Expires: Wed, 21 Okt 2099 07:28:00 GMT", b"max-age=0"),
        (b"Expires: Sunday, 06-Nov-94 08:49:37 GMT", b"max-age=0"),
    ],
)
@pytest.mark.parametrize("policy", [SHARED, SEPARATE], ids=["session", "subdomain"])
def test_when_an_answer_expires_is_said_to_browsers_alone(lines: bytes, cached: bytes, policy: Policy) -> None:
    """A front proxy that ignores ``private`` may obey a far Expires."""
    head = b"HTTP/1.1 200 OK\r\nDate: Wed, 21 Oct 2026 07:27:00 GMT\r\n" + lines + b"\r\nContent-Length: 0\r\n\r\n"
    found = parse_response(head, 100, b"GET", policy)
    assert found.cached == cached and b"xpires" not in found.lines
    assert b"xpires" in parse_response(head, 100, b"GET", None).lines  # the portal's


def test_blanks_before_the_colon_are_removed_from_answers():
    """RFC 9112, 5.1; in a request they are refused."""
    head = b"HTTP/1.1 200 OK\r\nX-A \t: b\r\nContent-Length : 5\r\n\r\n"
    parsed = parse_response(head, 100, b"GET", Policy())
    assert parsed.length == 5 and client_head(parsed, b"") == head.replace(b" \t:", b":").replace(b" : 5", b": 5")


@pytest.mark.parametrize("line", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_204_has_no_body_whatever_its_head_says(line):
    """RFC 9112, 6.3; the connection to the app is not used again."""
    parsed = parse_response(b"HTTP/1.1 204 No Content\r\n" + line + b"\r\n\r\n", 100, b"GET", Policy())
    assert parsed.length == 0 and parsed.close and client_head(parsed, b"") == b"HTTP/1.1 204 No Content\r\n\r\n"


OWN_COOKIES = [
    b"dispatcher=x", b"dispatcher=x; Domain=example.org", b"__Host-dispatcher=x; Secure; Path=/", b"Dispatcher=x",
    b"  dispatcher  =x", b"\tdispatcher=x", b"=dispatcher=x", b"= dispatcher=x", b"dispatcher", b"dispatcher;",
    b"__HOST-DISPATCHER-DEVICE=x", b"dispatcher-device=x", b"dispatcher-nonce=", b"dispatcher-form=x; path=/auth",
]  # fmt: skip


@pytest.mark.parametrize("cookie", OWN_COOKIES)
def test_an_agent_does_not_set_the_dispatchers_cookies(cookie):
    assert sets_own_cookie(cookie)
    head = (
        b"HTTP/1.1 200 OK\r\nset-COOKIE:" + cookie + b"\r\nSet-Cookie: app=1; Path=/\r\nContent-Length: 0\r\n\r\n"
    )
    answer = client_head(parse_response(head, 100, b"GET", Policy()), b"")
    assert b"spatcher" not in answer.lower().replace(b"app", b"") and b"Set-Cookie: app=1; Path=/\r\n" in answer
    assert cookie in client_head(parse_response(head, 100, b"GET", None), b""), "the portal may"


@pytest.mark.parametrize(
    "cookie", [b"app=dispatcher", b"dispatcher2=x", b"xdispatcher=1", b"a=1; dispatcher=2", b"=", b""]
)
def test_other_cookies_are_the_apps(cookie):
    assert not sets_own_cookie(cookie)


def test_cookies_lose_their_domain_where_agents_have_hosts_of_their_own():
    head = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Domain=example.org; Path=/\r\nSet-Cookie: b=2;DOMAIN = .x ;Secure\r\nSet-Cookie: domain=3; domain\r\nContent-Length: 0\r\n\r\n"
    answer = client_head(parse_response(head, 100, b"GET", Policy(host_only=True)), b"")
    assert b"Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2;Secure\r\nSet-Cookie: domain=3\r\n" in answer
    assert b"Domain=example.org" in client_head(parse_response(head, 100, b"GET", Policy()), b"")


def test_an_agent_says_nothing_about_the_whole_host():
    lines = (
        b"Strict-Transport-Security: max-age=1",
        b"Alt-Svc: h3=':1'",
        b'Clear-Site-Data: "*"',
        b"X-Accel-Redirect: /x",
        b"X-Sendfile: /etc/passwd",
        b"Keep-Alive: timeout=5",
        b"X-Sendfile2: /x 0-1",
        b"X-Reproxy-URL: http://x",
        b"X-Reproxy-File: /etc/passwd",
        b"Expect-CT: max-age=1",
        b"Accept-CH: Sec-CH-UA",
        b"Critical-CH: Sec-CH-UA",
        b'Use-As-Dictionary: match="/auth/*"',
        b"Upgrade: h2c",
        b"Connection: X-Hop",
        b"X-Hop: 1",
    )
    head = b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(lines) + b"\r\nX-Ok: 1\r\nContent-Length: 0\r\n\r\n"
    answer = client_head(parse_response(head, 100, b"GET", Policy(b"/auth/")), b"")
    assert answer == b"HTTP/1.1 200 OK\r\nX-Ok: 1\r\nContent-Length: 0\r\n\r\n"


def test_a_length_with_leading_zeros_is_written_anew():
    for text, length in ((b"02", 2), (b"000", 0), (b"0", 0), (b"10", 10)):
        parsed = parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % text, 100, b"GET", None)
        assert parsed.length == length
        assert client_head(parsed, b"") == b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length


@pytest.mark.parametrize("value,wide", [
    (b"/", True), (b"/a", True), (b"/auth", True), (b"/auth/", True), (b"/app/", False), (b"/authx", False), (b"..", True),
    (b"/app/../", True), (b"/%61uth/", True), (b"//h/app", True), (b"https://h/app/", True), (b"app/", True), (b"/ap\\p", True),
    (b"/au\tth/", True), (b"", True),
])  # fmt: skip
def test_service_worker_allowed(value, wide):
    assert widens(value, b"/auth/") is wide


def test_head_and_304_keep_what_they_say_of_a_length():
    for method, start in ((b"HEAD", b"HTTP/1.1 200 OK"), (b"GET", b"HTTP/1.1 304 Not Modified")):
        parsed = parse_response(start + b"\r\nContent-Length: 77\r\n\r\n", 100, method, None)
        assert parsed.length == 0 and b"Content-Length: 77" in client_head(parsed, b"")
    assert parse_response(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 100, b"HEAD", None).length == 0


def test_a_reason_may_be_missing_and_the_version_is_our_own():
    assert client_head(parse_response(b"HTTP/1.0 200\r\n\r\n", 100, b"GET", None), b"").startswith(
        b"HTTP/1.1 200 \r\n"
    )


# Chunks.


def feed(data: bytes, cuts: list[int], *, plain: bool = False):
    scanner = Chunked(plain=plain)
    out = b""
    start = 0
    for cut in [*sorted(cuts), len(data)]:
        piece = data[start:cut]
        start = cut
        if scanner.done:
            scanner.rest += piece
        elif piece:
            out += scanner.feed(piece)
    return out, scanner


BODY = b"5\r\nhello\r\nA;ext=1\r\n0123456789\r\n0;last\r\nX-T: 1\r\nHost: evil\r\n\r\nGET /next"


@pytest.mark.parametrize("plain", [False, True])
def test_chunks_split_at_every_position(plain):
    expected = b"hello0123456789" if plain else b"5\r\nhello\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n"
    for first in range(len(BODY) + 1):
        for second in range(first, len(BODY) + 1, 3):
            out, scanner = feed(BODY, [first, second], plain=plain)
            assert out == expected and scanner.done and scanner.rest == b"GET /next" and scanner.size == 15


@pytest.mark.parametrize("body", [
    b"x\r\n", b"-1\r\n", b"0x5\r\n", b"5 \r\nhello\r\n", b" 5\r\nhello\r\n", b"5\nhello\r\n", b"5\r\nhelloX\r\n", b"5\r\nhello\n0\r\n",
    b"\r\n", b";x\r\n", b"FFFFFFFFFFFFFFFFF\r\n", b"5;a\0b\r\nhello\r\n", b"5;a\rb\r\nhello\r\n", b"5" + b";" + b"x" * 300 + b"\r\n",
    b"0\r\nX-A : b\r\n\r\n", b"0\r\n folded\r\n\r\n", b"0\r\nX-A: b\0\r\n\r\n", b"0\r\n" + b"X-A: b\r\n" * 5000, b"5\r\nhel\r\n0\r\n\r\n",
    b"1;" + b"x" * 250 + b"\r\na\r\n" * 1 + (b"1;" + b"x" * 250 + b"\r\na\r\n") * 100,
])  # fmt: skip
def test_bad_chunks(body):
    with pytest.raises(BadHead):
        feed(body, [])
    with pytest.raises(BadHead):
        feed(body, list(range(1, len(body)))[:3000])


@settings(max_examples=150 * LONGER, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.lists(st.integers(0, 300), max_size=5))
def test_chunks_that_leave_are_what_h11_reads(pieces, cuts):
    body = b"".join(b"%X\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    out, scanner = feed(body, [cut for cut in cuts if cut < len(body)])
    assert out == body and scanner.done
    judge = h11.Connection(h11.SERVER)
    judge.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + out)
    data = b""
    judge.next_event()
    while not isinstance(event := judge.next_event(), h11.EndOfMessage):
        data += event.data
    assert data == b"".join(pieces)


@settings(max_examples=150 * LONGER, deadline=None)
@given(st.binary(max_size=80), st.lists(st.integers(0, 80), max_size=4))
def test_noise_as_chunks_is_refused_alike_however_it_is_split(noise, cuts):
    def outcome(cuts):
        try:
            out, scanner = feed(noise, [cut for cut in cuts if cut < len(noise)])
        except BadHead:
            return "bad"
        return out, scanner.done, scanner.rest

    assert outcome([]) == outcome(cuts) or "bad" in (outcome([]), outcome(cuts)) and outcome(cuts) == outcome([])


def test_names_are_learned_in_bounds():
    before = len(REQUEST_NAMES.known)
    for number in range(5000):
        request(b"GET / HTTP/1.1\r\n" + HOST + b"Content-%d: a\r\nUser-Agent: %d\r\n\r\n" % (number, number))
    assert len(REQUEST_NAMES.known) <= before + 1024
    # What is always known stays: a name of framing keeps its meaning after all that.
    assert request(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\n").length == 5
