"""Cookies, WebSocket frames, activity, tables, forwarding and pages of the edge, without a socket."""

from __future__ import annotations

import json
import random
import struct

import pytest

from dispatcher.proxy.edge.http.field_names import (
    BadHead,
    X_FORWARDED_FOR,
    X_FORWARDED_HOST,
    X_FORWARDED_PROTO,
    X_REQUEST_ID,
)
from dispatcher.config.load import parse
from dispatcher.plugin.errors import ConfigError
from dispatcher.proxy.edge.http.cookie import split_cookie
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.activity import PollDetector, Traffic
from dispatcher.proxy.edge.http.trusted_proxies import TrustedProxies, usable_request_id
from dispatcher.proxy.edge.http.proxy_protocol import SIGNATURE, parse_address, parse_head
from dispatcher.proxy.edge.http.request import parse_request
from dispatcher.proxy.edge.routing.settings import Settings
from dispatcher.proxy.edge.routing.table import Tables
from dispatcher.proxy.edge.http.websocket import Scanner, close_frame
from tests.support.edge_feed import agent_row, session_row

NAME = b"dispatcher"


@pytest.mark.parametrize("value,token,rest", [
    (b"dispatcher=t", b"t", b""), (b"a=1; dispatcher=t", b"t", b"a=1"), (b"dispatcher=t; a=1", b"t", b"a=1"),
    (b"a=1;dispatcher=t;b=2", b"t", b"a=1;b=2"), (b"a=1;  b=\"x y\" ; dispatcher = t", b"t", b"a=1;  b=\"x y\""),
    (b"dispatcher=t; dispatcher=u", None, b""), (b"dispatcher=t; a=1; dispatcher=t", None, b"a=1"),
    (b"__Host-dispatcher=t; a=1", None, b"a=1"), (b"dispatcher-device=d; dispatcher=t", b"t", b""),
    (b"a=dispatcher", None, b"a=dispatcher"), (b"xdispatcher=1", None, b"xdispatcher=1"), (b"a=1", None, b"a=1"),
    (b"Dispatcher=t", None, b"Dispatcher=t"), (b"a=\"; dispatcher=t", b"t", b"a=\""), (b";;dispatcher=t;;", b"t", b";;;"),
    (b"dispatcher", None, b""), (b"dispatcher=", b"", b""), (b"dispatcher-form=f; dispatcher-nonce=n", None, b""),
])  # fmt: skip
def test_the_dispatchers_cookies_are_taken_out(value, token, rest):
    found, left = split_cookie(value, NAME)
    assert (found or b"", left) == (token or b"", rest)


# WebSocket frames.


def frame(opcode: int, payload: bytes, *, masked: bool, fin: bool = True) -> bytes:
    head = bytes([(0x80 if fin else 0) | opcode])
    bit = 0x80 if masked else 0
    if len(payload) < 126:
        head += bytes([bit | len(payload)])
    elif len(payload) < 65536:
        head += bytes([bit | 126]) + struct.pack(">H", len(payload))
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", len(payload))
    return head + (b"mask" if masked else b"") + payload


@pytest.mark.parametrize("masked", [True, False])
def test_frames_are_followed_however_they_are_split(masked):
    frames = [
        (1, b"hello"),
        (9, b"ping"),
        (2, b"x" * 126),
        (0, b"y" * 70000),
        (10, b""),
        (2, b""),
        (8, b"\x03\xe8"),
    ]
    data = b"".join(frame(opcode, payload, masked=masked) for opcode, payload in frames)
    expected = sum(len(frame(opcode, payload, masked=masked)) for opcode, payload in frames if opcode < 8)
    rng = random.Random(1)
    for attempt in range(60):
        scanner = Scanner()
        counted = position = 0
        while position < len(data):
            size = rng.choice([1, 2, 3, 7, 14, 15, 200, 80000]) if attempt else len(data)
            counted += scanner.scan(data[position : position + size])
            position += size
        assert counted == expected and scanner.between and not scanner.broken


def test_between_tells_where_a_frame_may_be_put():
    scanner = Scanner()
    data = frame(2, b"x" * 300, masked=True)
    for byte in range(len(data)):
        assert scanner.between is (byte == 0)
        scanner.scan(data[byte : byte + 1])
    assert scanner.between


@pytest.mark.parametrize("masked,size", [(False, 128), (True, 132)])
def test_the_first_bytes_of_a_longer_frame_are_no_short_one(masked, size):
    scanner = Scanner()
    data = frame(2, b"x" * 300, masked=masked)
    scanner.scan(data[:size])
    assert not scanner.between
    scanner.scan(data[size:])
    assert scanner.between


def test_pings_and_pongs_are_no_use():
    scanner = Scanner()
    assert scanner.scan(frame(9, b"", masked=True)) == scanner.scan(frame(10, b"abc", masked=True)) == 0
    assert scanner.scan(frame(1, b"abc", masked=True)) == 9


def test_a_length_beyond_63_bits_is_no_websocket():
    scanner = Scanner()
    scanner.scan(b"\x82\x7f" + b"\xff" * 8)
    assert scanner.broken and not scanner.between and scanner.scan(b"anything") == 8


def test_close_frames():
    assert close_frame(1001, masked=False) == b"\x88\x02\x03\xe9"
    scanner = Scanner()
    scanner.scan(close_frame(1008, masked=True))
    assert scanner.between


# Activity.


def ask(line: bytes, *fields: bytes):
    return parse_request(line + b" HTTP/1.1\r\nHost: a\r\n" + b"".join(f + b"\r\n" for f in fields) + b"\r\n", 100)


FETCH = b"Sec-Fetch-Mode: cors"


def test_people_navigate_and_change_things():
    detector = PollDetector()
    for second in (0, 1, 2, 5, 6, 20, 21, 40, 300, 301):
        assert not detector.is_poll(ask(b"GET /", b"Sec-Fetch-Mode: navigate"), second)
        assert not detector.is_poll(ask(b"POST /save", FETCH), second)
        assert not detector.is_poll(ask(b"GET /item/%d" % second, FETCH), second)


@pytest.mark.parametrize(
    "pauses", [[1.0], [0.05], [600.0], [3, 7], [2, 2, 6], [5, 9, 6, 8, 7], [1, 1, 60, 60, 60]]
)
def test_a_rhythm_is_recognised(pauses):
    detector = PollDetector()
    now = 0.0
    polls = []
    for number in range(60):
        polls.append(detector.is_poll(ask(b"GET /api/status", FETCH), now))
        now += pauses[number % len(pauses)]
    assert polls[:2] == [False, False] and all(polls[-40:]) and polls.count(False) <= 4


def test_numbers_against_caches_make_no_new_target():
    detector = PollDetector()
    polls = [
        detector.is_poll(ask(b"GET /api/kernels?%d" % (1700000000000 + n), FETCH), n * 10.0) for n in range(10)
    ]
    assert polls == [False, False] + [True] * 8


def test_a_long_pause_breaks_a_rhythm_once():
    detector = PollDetector()
    for second in range(0, 100, 10):
        detector.is_poll(ask(b"GET /s", FETCH), float(second))
    assert not detector.is_poll(ask(b"GET /s", FETCH), 5000.0)


def test_prefetches_and_options_are_the_browsers():
    detector = PollDetector()
    assert detector.is_poll(ask(b"GET /a", b"Sec-Purpose: prefetch", b"Sec-Fetch-Mode: navigate"), 0.0)
    assert detector.is_poll(ask(b"OPTIONS /a"), 0.0)


def test_programs_wake_with_head_propfind_and_seldom_gets():
    """A cron job comes once an hour, a monitor once a minute."""
    for method in (b"HEAD", b"PROPFIND", b"GET"):
        detector = PollDetector()
        assert not any(detector.is_poll(ask(method + b" /a"), n * 3600.0) for n in range(6)), method
        detector = PollDetector()
        assert [detector.is_poll(ask(method + b" /a"), n * 60.0) for n in range(4)] == [False, False, True, True]
    for line in (b"Referer: http://a/", b"Origin: http://a", FETCH):
        detector = PollDetector()
        assert [detector.is_poll(ask(b"GET /a", line), n * 3600.0) for n in range(4)] == [False, False, True, True]


def test_a_websocket_that_is_opened_again_and_again_is_no_use():
    detector = PollDetector()
    upgrade = (b"Connection: Upgrade", b"Upgrade: websocket")
    polls = [detector.is_poll(ask(b"GET /ws?sid=%d" % n, *upgrade), n * 5.0) for n in range(5)]
    assert polls == [False, False, True, True, True]


def test_what_is_remembered_is_bounded():
    detector = PollDetector()
    for number in range(5000):
        detector.is_poll(ask(b"GET /%d" % number, FETCH), 0.0)
    assert len(detector._seen) <= 128


def test_a_trickle_is_no_stream():
    traffic = Traffic()
    assert traffic.report(5.0, 0) is None
    traffic.bytes_out = traffic.bulk = 5000
    assert traffic.report(5.0, 2) == {"out": 5000, "idle_sockets": 2}
    traffic.bytes_out = traffic.bulk = 5200
    assert traffic.report(5.0, 0) == {"out": 5200, "stream": 5200}
    traffic.stream = 9
    assert traffic.report(5.0, 0) == {"stream": 9}
    assert traffic.report(5.0, 0) is None


@pytest.mark.parametrize(
    ("lines", "host"),
    [
        ((b"X-Forwarded-Host: apps.test",), b"apps.test"),
        ((b"X-Forwarded-Host: apps.test", b"X-Forwarded-Port: 8443"), b"apps.test:8443"),
        ((b"X-Forwarded-Port: 8443",), b"a:8443"),
        ((b"X-Forwarded-Port: 443",), b"a"),
        ((b"X-Forwarded-Host: apps.test:8080", b"X-Forwarded-Port: 8443"), b"apps.test:8080"),
        ((b"X-Forwarded-Host: [::1]", b"X-Forwarded-Port: 8443"), b"[::1]:8443"),
        ((b"X-Forwarded-Port: 8443x",), b"a"),
        ((b"X-Forwarded-Port: 80",), b"a"),  # between two proxies, of which the outer one ends TLS
    ],
)
def test_a_trusted_proxy_states_the_port_apart(lines, host):
    proxies = TrustedProxies((), unix=True, scheme=b"https")
    asked = ask(b"GET /", b"X-Forwarded-Proto: https", *lines)
    assert proxies.client_of("", asked.fields)[2] == host


# Tables.


def snapshot(first, last, agents=(), sessions=()):
    return {"type": "snapshot", "first": first, "last": last, "agents": list(agents), "sessions": list(sessions)}


def test_a_snapshot_in_parts_replaces_what_was():
    tables = Tables()
    tables.apply(
        snapshot(
            True,
            True,
            [agent_row("a", "unix:/a"), agent_row("b", "unix:/b")],
            [session_row("t", "a"), session_row("u", "b")],
        ),
        0.0,
    )
    old = tables.agents["a"]
    gone = tables.agents["b"]
    tables.apply(snapshot(True, False, [agent_row("a", "unix:/a")]), 0.0)
    assert set(tables.agents) == {"a", "b"}, "nothing goes before the last part"
    changes = tables.apply(snapshot(False, True, [], [session_row("t", "a")]), 0.0)
    assert tables.agents == {"a": old} and gone.gone and len(tables.sessions) == 1
    assert [session.user for session in changes.sessions_gone] == ["b"]
    assert changes.moved == [gone]


def test_generations_tell_which_connections_are_old():
    tables = Tables()

    def change(*rows):
        return tables.apply({"type": "change", "agents": list(rows)}, 0.0).moved

    change(agent_row("a", "unix:/a", uid=1))
    agent = tables.agents["a"]
    before = agent.generation
    assert not change(agent_row("a", "unix:/a", uid=1, detail="new"))
    assert agent.generation == before
    for row in (
        agent_row("a", "unix:/b", uid=1),
        agent_row("a", "unix:/b", uid=2),
        agent_row("a", "unix:/b", "asleep", uid=2),
    ):
        assert change(row) == [agent] and agent.generation > before
        before = agent.generation
    assert not change(agent_row("a", "unix:/b", uid=2)), "it was given up when it fell asleep"


def test_a_session_follows_its_agent():
    tables = Tables()
    tables.apply(
        {
            "type": "change",
            "agents": [agent_row("a", "unix:/a"), agent_row("a:x", "unix:/x")],
            "sessions": [session_row("t", "a")],
        },
        10.0,
    )
    (session,) = tables.sessions.values()
    assert tables.target(session) is tables.agents["a"] and session.expires == 3610.0
    tables.apply({"type": "change", "sessions": [session_row("t", "a:x", ttl=None)]}, 10.0)
    assert tables.target(session) is tables.agents["a:x"] and session.expires == float("inf")
    tables.apply({"type": "change", "agents_gone": ["a:x"]}, 10.0)
    assert tables.target(session) is None
    tables.apply({"type": "change", "agents": [agent_row("a:x", "unix:/y")]}, 10.0)
    assert tables.target(session).endpoint == "unix:/y"


def test_labels_follow_agents():
    tables = Tables()
    tables.apply(
        {
            "type": "change",
            "agents": [agent_row("a", "unix:/a", label="one"), agent_row("b", "unix:/b", label="two")],
        },
        0.0,
    )
    tables.apply(
        {"type": "change", "agents": [agent_row("a", "unix:/a", label="three")], "agents_gone": ["b"]}, 0.0
    )
    assert {label: agent.name for label, agent in tables.labels.items()} == {"three": "a"}


def test_names_beyond_ascii_are_percent_encoded():
    tables = Tables()
    tables.apply({"type": "change", "agents": [agent_row("jörg@example.org", "unix:/a")]}, 0.0)
    assert tables.agents["jörg@example.org"].identity == b"X-Dispatcher-User: j%C3%B6rg@example.org\r\n"


@pytest.mark.parametrize("row", [{}, {"name": 1}, {"name": "a", "user": None}])
def test_a_row_that_is_none_is_an_error_of_the_feed(row):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Tables().apply({"type": "change", "agents": [row], "sessions": [{"sha256": "zz"}]}, 0.0)


# Trusted proxies.


def forwarded(*trusted):
    settings = Settings(parse({"proxy": {"trusted_proxies": list(trusted)}}))
    return TrustedProxies(settings.trusted, unix=settings.trusted_unix, scheme=settings.scheme)


@pytest.mark.parametrize("peer,value,expected", [
    ("10.0.0.1", b"1.2.3.4", b"1.2.3.4"), ("10.0.0.1", b"6.6.6.6, 1.2.3.4", b"1.2.3.4"),
    ("10.0.0.1", b"6.6.6.6, 1.2.3.4, 10.0.0.2", b"1.2.3.4"), ("10.0.0.1", b"junk, 10.0.0.2", b"10.0.0.2"),
    ("10.0.0.1", b"", b"10.0.0.1"), ("10.0.0.1", b"[2001:db8::1]:443", b"2001:db8::1"), ("10.0.0.1", b"1.2.3.4:80", b"1.2.3.4"),
    ("10.0.0.1", b"::ffff:1.2.3.4", b"1.2.3.4"), ("10.0.0.1", b"1.2.3.4\t, unknown", b"10.0.0.1"),
])  # fmt: skip
def test_the_client_behind_trusted_proxies(peer, value, expected):
    assert forwarded("10.0.0.0/8").client_of(peer, {X_FORWARDED_FOR: value})[0] == expected


def test_nobody_is_trusted_by_default():
    nobody, some = forwarded(), forwarded("10.0.0.0/8", "unix", "::1")
    assert [nobody.peer(a)[1] for a in ("127.0.0.1", "10.0.0.1", "::1", "")] == [False] * 4
    assert [some.peer(a)[1] for a in ("127.0.0.1", "10.0.0.1", "::1", "")] == [False, True, True, True]
    assert nobody.peer("127.0.0.1")[2] and not nobody.peer("1.2.3.4")[2]
    assert nobody.peer("garbage") == (b"unknown", False, False)


def test_scheme_host_and_id_of_trusted_proxies():
    some = forwarded("10.0.0.0/8")
    fields = {X_FORWARDED_PROTO: b"http, HTTPS", X_FORWARDED_HOST: b"evil, apps.test:8443", X_REQUEST_ID: b"abc-1"}
    assert some.client_of("10.0.0.1", fields)[1:] == (b"https", b"apps.test:8443")
    assert some.client_of("10.0.0.1", {X_FORWARDED_PROTO: b"gopher", X_FORWARDED_HOST: b"a b"})[1:] == (
        b"http",
        b"",
    )
    assert usable_request_id(fields) == b"abc-1"
    assert usable_request_id({X_REQUEST_ID: b'a"b'}) == usable_request_id({X_REQUEST_ID: b"x" * 200}) == b""


@pytest.mark.parametrize("proxy,word", [
    ({"trusted_proxies": ["10.0.0.0/99"]}, "trusted_proxies"), ({"public_url": "ftp://a"}, "public_url"),
    ({"public_url": "https://a/path"}, "public_url"), ({"public_url": "https://a:99999"}, "public_url"), ({"public_url": "nonsense"}, "public_url"),
])  # fmt: skip
def test_settings_that_make_no_sense_say_so(proxy, word):
    with pytest.raises(ConfigError, match=word):
        Settings(parse({"proxy": proxy}))


# PROXY protocol.


def proxied(command: int, family: int, rest: bytes) -> bytes:
    return SIGNATURE + bytes([0x20 | command, family]) + struct.pack("!H", len(rest)) + rest


def test_proxy_protocol():
    v4 = bytes([1, 2, 3, 4, 10, 0, 0, 1]) + struct.pack("!HH", 1, 2)
    assert parse_head(proxied(1, 0x11, v4)[:16]) == (1, 0x11, 12)
    assert parse_address(1, 0x11, v4) == "1.2.3.4"
    v6 = bytes.fromhex("20010db8000000000000000000000001") * 2 + b"\0\0\0\0"
    assert parse_address(1, 0x21, v6) == "2001:db8::1"
    assert parse_address(1, 0x21, bytes.fromhex("00000000000000000000ffff01020304") * 2 + b"\0\0\0\0") == "1.2.3.4"
    assert parse_address(0, 0x11, v4) is None and parse_address(1, 0x31, b"x" * 216) is None
    assert parse_address(1, 0x11, v4 + b"tlvs follow") == "1.2.3.4"
    for bad in (
        b"PROXY TCP4 1.2.3",
        proxied(1, 0x11, v4)[:12] + b"\x11\x11\0\x0c",
        proxied(2, 0x11, v4)[:16],
        SIGNATURE + b"\x21\x11\xff\xff",
    ):
        with pytest.raises(BadHead):
            parse_head(bad[:16].ljust(16))
    with pytest.raises(BadHead):
        parse_address(1, 0x11, v4[:4])


# Pages.


def test_failures_are_escaped_and_never_cached():
    what = pages.Failure(503, "x", "<b>", "<script>", "a & b", retry_after=3, extra={"agent": {"name": "<i>"}})
    page = pages.failure(what, b"", "<id>", page=True, close=True, body=True)
    assert b"&lt;b&gt;" in page and b"<script>" not in page and b"<id>" not in page and b"a &amp; b" in page
    assert (
        b"\r\nCache-Control: no-store\r\n" in page
        and b"\r\nRetry-After: 3\r\n" in page
        and b"Connection: close" in page
    )
    document = pages.failure(what, b"", "id", page=False, close=False, body=True).partition(b"\r\n\r\n")[2]
    assert json.loads(document)["code"] == "x" and json.loads(document)["agent"] == {"name": "<i>"}
    assert pages.failure(what, b"", "id", page=False, close=False, body=False).endswith(b"\r\n\r\n")
