"""Exchanges, tunnels and what they count as use, over transports that a test drives."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.proxy.edge.net.upstream import dense_pause
from dispatcher.proxy.edge.routing.settings import HALF_CLOSED
from tests.support.edge_feed import agent_row
from tests.unit.proxy.edge.net.test_back_pressure import TOKEN, World, request

HEAD = b"Host: a\r\nCookie: dispatcher=" + TOKEN.encode() + b"\r\n"


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def warning(self, what: str, **fields: Any) -> None:
        self.lines.append((what, fields))


def everything(world: World) -> None:
    for what in ("send", "take", "answer", "read"):
        world.step(what, 1 << 20)


def reports(world: World) -> dict[str, Any]:
    """Return the next activity report."""
    sent: list[dict[str, Any]] = []
    world.feed.send = lambda message: bool(sent.append(message)) or True  # type: ignore[method-assign]
    world.report()
    return next((message for message in sent if message["type"] == "activity"), {"agents": {}, "sessions": []})


def test_a_safe_request_with_a_body_is_not_sent_again_without_it() -> None:
    """The agent takes it, and dies.  Sent again when the agent is back, it would swallow the client's next request."""
    world = World()
    world.near.received += b"PROPFIND /0 HTTP/1.1\r\n" + HEAD + b"Content-Length: 5\r\n\r\nhello"
    world.step("send", 1 << 20)
    world.step("take", 1 << 20)
    world.peers[0].transport.received.clear()
    world.peers[0].transport.close()
    world.loop.run()
    for state in ("asleep", "running"):
        world._on_message({"type": "change", "agents": [agent_row("alice", "tcp:127.0.0.1:9", state)]})
        world.loop.run()
    world.near.received += b"GET /7 HTTP/1.1\r\n" + HEAD + b"\r\n"
    world.finish()
    assert world.got.startswith(b"HTTP/1.1 502 ") and world.got.endswith(b"\r\n\r\nxxxxxxx")
    assert world.got.count(b"HTTP/1.1 ") == 2


def test_caches_keep_an_agents_answer_for_its_session_alone() -> None:
    """Agents share an origin: another person, or another app, of the same browser gets nothing from its cache."""
    world = World()
    world.near.received += request("get", 3, 0)
    world.finish()
    assert b"\r\nCache-Control: private\r\nVary: Cookie\r\n" in world.got


def heartbeat(world: World, size: int = 20) -> int:
    """Return how many bytes of use a message of the client counts."""
    traffic = world.context.tables.agents["alice"].traffic
    before = traffic.stream
    world.near.received += bytes([0x82, 0x80 | (size - 6)]) + b"\0" * (size - 2)
    world.step("send", 1 << 20)
    return traffic.stream - before


def opened() -> tuple[World, list[float]]:
    world = World()
    now = [1000.0]
    world.context.clock = lambda: now[0]
    world.near.received += request("upgrade", 0, 0)
    everything(world)
    assert b" 101 " in world.got
    return world, now


@pytest.mark.parametrize("pause", [1.5, 25.0])
def test_small_messages_at_even_pauses_are_no_use_and_do_not_wake(pause: float) -> None:
    world, now = opened()
    counted = []
    for number in range(12):
        now[0] += pause * (1 + 0.02 * (number % 3))
        counted.append(heartbeat(world))
    assert all(counted[:3]) and not any(counted[4:])
    woken: list[Any] = []
    world.context.tables.agents["alice"].state = "asleep"
    world.wake = woken.append  # type: ignore[method-assign]
    now[0] += pause
    assert not heartbeat(world) and not woken
    now[0] += pause / 3
    assert heartbeat(world) and woken, "but a person's message does"


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "part, read",
    [(b"1\r\nx\r\n", False), (b"200\r\n" + 512 * b"x" + b"\r\n", True), (b"", True)],
    ids=["tiny chunks", "chunks", "one tiny chunk"],
)
def test_bodies_of_tiny_chunks_wait_so_that_others_get_their_turn(part: bytes, read: bool) -> None:
    """Parsing 256 KiB of chunks with one byte each takes as long as a hundred requests."""
    world = World()
    world.near.received += b"POST /3 HTTP/1.1\r\n" + HEAD + CHUNKED
    world.step("send", 1 << 17)
    near, far = world.near, world.peers[0].transport
    near.received += 48_000 // max(len(part), 1) * part + b"1\r\nx\r\n"
    world.step("send", 1 << 17)
    far.received += b"HTTP/1.1 200 OK\r\n" + CHUNKED
    far.feed(1 << 20)
    far.received += 48_000 // max(len(part), 1) * part + b"1\r\nx\r\n"
    far.feed(1 << 17)
    assert [near.reading, far.reading] == [read, read]
    while world.loop.later:
        world.loop.later.pop()()
    assert near.reading and far.reading


@pytest.mark.parametrize(
    "size, count, read",
    [(0, 6000, False), (8, 3000, False), (100, 400, True), (0, 1, True), (0, 60, True)],
    ids=["no bytes", "a few bytes", "messages", "one", "some"],
)
def test_websockets_of_tiny_frames_wait_so_that_others_get_their_turn(size: int, count: int, read: bool) -> None:
    world, _ = opened()
    near, far = world.near, world.peers[0].transport
    for _ in range(2):
        near.received += count * (bytes([0x82, 0x80 | size]) + bytes(4 + size))
        near.feed(1 << 17)
        far.received += count * (bytes([0x82, size]) + bytes(size))
        far.feed(1 << 17)
        assert [near.reading, far.reading] == [read, read]
        while world.loop.later:
            world.loop.later.pop()()
        assert near.reading and far.reading
        # One short frame is passed on without a look at others.
        near.received += bytes([0x82, 0x80 | 1]) + bytes(5)
        near.feed(1 << 17)
        far.received += b"\x82\x01a"
        far.feed(1 << 17)
        assert near.reading and far.reading
        near.take(1 << 20)
        far.take(1 << 20)


def test_a_client_that_does_not_read_holds_the_agent_beyond_its_pause() -> None:
    world, _ = opened()
    near, far = world.near, world.peers[0].transport
    far.received += b"\x82\x7e\xea\x60" + bytes(60_000)
    far.feed(1 << 20)
    assert far.reading
    far.received += 6000 * b"\x82\x00"
    far.feed(1 << 20)
    assert near.paused and world.loop.later
    while world.loop.later:
        world.loop.later.pop()()
    assert not far.reading
    while near.sent:
        near.take(1 << 20)
    assert far.reading


def test_the_bodies_of_one_agent_wait_for_each_other() -> None:
    agent = World().context.tables.agents["alice"]
    assert dense_pause(agent, 60_000, 10_000, 100.0) == pytest.approx(0.05)
    assert dense_pause(agent, 60_000, 10_000, 100.01) == pytest.approx(0.09)
    assert dense_pause(agent, 60_000, 10_000, 500.0) == pytest.approx(0.05)


def test_typing_is_use_beside_heartbeats() -> None:
    world, now = opened()
    for _ in range(8):
        now[0] += 10
        heartbeat(world)
    typed = []
    for pause in (0.1, 0.3, 2.0, 0.2, 5.0, 1.1, 0.4):
        now[0] += pause
        typed.append(heartbeat(world, 9))
    assert all(typed)


def test_requests_under_way_are_use_and_prolong_their_session() -> None:
    world = World()
    world.near.received += request("get", 3, 0)
    world.step("send", 1 << 20)
    for _ in range(3):
        report = reports(world)
        assert report["agents"]["alice"]["use"] >= 1 and len(report["sessions"]) == 1
    world.finish()
    reports(world)
    assert reports(world) == {"agents": {}, "sessions": []}


def test_an_event_stream_that_is_open_is_no_use_by_itself() -> None:
    world = World()
    world.near.received += b"GET /3 HTTP/1.1\r\nAccept: text/event-stream\r\n" + HEAD + b"\r\n"
    world.step("send", 1 << 20)
    reports(world)
    report = reports(world)
    assert not report["agents"].get("alice", {}).get("use") and len(report["sessions"]) == 1


def test_typing_prolongs_the_session() -> None:
    world, now = opened()
    reports(world)
    assert reports(world)["sessions"] == []
    now[0] += 3
    heartbeat(world)
    assert len(reports(world)["sessions"]) == 1


def test_a_client_that_closed_its_side_is_held_for_a_bounded_time() -> None:
    """It may be gone: what it sent last looks the same."""
    world = World()
    world.near.received += request("get", 3, 0)
    world.step("send", 1 << 20)
    client = world.near.protocol
    assert client.eof_received()
    assert client.deadline <= world.context.now + HALF_CLOSED
    world.finish()
    assert world.got.endswith(b"xxx")


def test_the_operator_reads_of_a_service_worker_that_is_refused() -> None:
    world = World()
    log = world.context.logger = Log()  # type: ignore[assignment]
    for _ in range(2):
        world.near.received += b"GET /sw.js?secret HTTP/1.1\r\nService-Worker: script\r\n" + HEAD + b"\r\n"
        world.finish()
    ((what, fields),) = log.lines
    assert "service worker" in what and fields == {"agent": "alice", "path": "/sw.js"}


def test_the_operator_reads_of_an_apps_path_under_the_portals_prefix() -> None:
    world = World()
    log = world.context.logger = Log()  # type: ignore[assignment]
    world.near.received += request("get", 3, 0)
    world.finish()
    for _ in range(2):
        world.near.received += b"GET /auth/api/login?secret HTTP/1.1\r\n" + HEAD + b"\r\n"
        world.step("send", 1 << 20)
        portal = world.peers[-1].transport
        portal.take(1 << 20)
        portal.received += b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        portal.feed(1 << 20)
        world.step("read", 1 << 20)
    ((what, fields),) = log.lines
    assert "proxy.prefix" in what and fields == {"agent": "alice", "path": "/auth/api/login"}
    assert b"Vary: Cookie" not in world.got.rpartition(b"HTTP/1.1 404")[2], (
        "the portal knows what to say to caches"
    )
