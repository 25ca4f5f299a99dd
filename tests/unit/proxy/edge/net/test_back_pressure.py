"""Back-pressure of the edge over transports that a test drives: whatever the order in which clients and agents read,
write and pause, what waits in the edge's memory is bounded, and everything arrives in the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.config.load import parse
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.net.connection import Connection
from dispatcher.proxy.edge.net.upstream import Upstream
from dispatcher.proxy.edge.routing.settings import PIPELINED, WRITE_HIGH, Settings
from dispatcher.proxy.edge.worker import Worker
from tests.support.edge_feed import agent_row, session_row

TOKEN = "token-of-alice-0123456789abcdefghijklmnopqr"
HIGH = 65536  # bytes above which a transport asks its protocol to pause, and the most that it reads at once
BOUND = WRITE_HIGH + 3 * HIGH


class Loop:
    """Calls back when the test says so; time does not pass."""

    def __init__(self) -> None:
        self._soon: deque[Callable[[], object]] = deque()
        self.later: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._soon.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        self.later.append(callback)

    def run(self) -> None:
        while self._soon:
            self._soon.popleft()()

    def turn(self) -> None:
        """Run what is due now; what that makes due waits for the next turn."""
        for _ in range(len(self._soon)):
            self._soon.popleft()()


class Transport:
    """A transport with flow control as asyncio defines it; `sent` is what its peer has not read yet."""

    def __init__(self, loop: Loop, protocol: Any) -> None:
        self.loop = loop
        self.protocol = protocol
        self.sent = bytearray()
        self.received = bytearray()
        self.reading = True
        self.paused = self.closing = self.lost = False
        self.high = HIGH
        self.most = 0
        protocol.connection_made(self)

    # For the edge.

    def write(self, data: bytes) -> None:
        if self.closing:
            return
        self.sent += data
        self.most = max(self.most, len(self.sent))
        if len(self.sent) > self.high and not self.paused:
            self.paused = True
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.sent)

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 40000) if name == "peername" else default

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.close()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closing = True
        self._end()

    def abort(self) -> None:
        self.closing = True
        self.sent.clear()
        self._end()

    def _end(self) -> None:
        if not self.sent and not self.lost:
            self.lost = True
            self.loop.call_soon(lambda: self.protocol.connection_lost(None))

    # For the peer.

    def feed(self, size: int) -> None:
        """Let the edge read what has arrived."""
        while self.received and self.reading and not self.closing and size > 0:
            size -= self.read(size)
            self.loop.run()

    def read(self, size: int) -> int:
        """Let the edge read once."""
        piece = bytes(self.received[: min(size, HIGH)])
        del self.received[: len(piece)]
        self.protocol.data_received(piece)
        return len(piece)

    def take(self, size: int) -> bytes:
        """Read what the edge has written."""
        data = bytes(self.sent[:size])
        del self.sent[:size]
        if self.paused and len(self.sent) <= 16:
            self.paused = False
            self.protocol.resume_writing()
        if self.closing:
            self._end()
        self.loop.run()
        return data


class Peer:
    """An agent at the other end of an upstream connection: answers each request with as many bytes as its path says.

    With ``early`` in the path it answers as soon as the head is there, and reads the body later or never.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.input = b""
        self.body = 0  # bytes of a request's body that are still to come
        self.ready: deque[int] = deque()  # sizes of answers that are due once the body is here
        self.due = 0
        self.tunnel = False

    def take(self, size: int) -> None:
        self.input += self.transport.take(size)
        while self.input:
            if self.tunnel:
                self.input = b""
            elif self.body:
                taken = min(self.body, len(self.input))
                self.body -= taken
                self.input = self.input[taken:]
                if not self.body:
                    self._answer()
            elif b"\r\n\r\n" in self.input:
                head, _, self.input = self.input.partition(b"\r\n\r\n")
                path = head.split(b" ")[1].decode()
                _, _, length = head.lower().partition(b"content-length: ")
                self.body = int(length.split(b"\r\n")[0] or b"0")
                self.ready.append(int(path.rpartition("/")[2]))
                if "/upgrade" in path:
                    self.transport.received += (
                        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
                    )
                    self.tunnel = True
                    self.due += self.ready.popleft()
                elif not self.body or "/early" in path:
                    self._answer()
            else:
                break

    def _answer(self) -> None:
        if self.ready:
            size = self.ready.popleft()
            self.transport.received += b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
            self.due += size

    def answer(self, size: int) -> None:
        """Write some of what is due, and let the edge read it."""
        size = min(size, self.due)
        self.due -= size
        self.transport.received += b"x" * size
        self.transport.feed(1 << 30)


class World(Worker):
    """A worker with one agent; upstream connections are made of `Transport`."""

    def __init__(self) -> None:
        super().__init__(Settings(parse({})), "/nowhere", "/nowhere", AccessLog(None))
        self.loop = Loop()
        self.context.loop = self.loop  # type: ignore[assignment]
        self.context.connect = self.connect
        self.peers: list[Peer] = []
        rows = {"agents": [agent_row("alice", "tcp:127.0.0.1:9")], "sessions": [session_row(TOKEN, "alice")]}
        self._on_message({"type": "change", **rows})
        self.near = Transport(self.loop, Connection(self.clients, self.events))
        self.got = bytearray()

    def connect(self, agent: Any, client: Any) -> None:
        def opened() -> None:
            upstream = Upstream(self.context, agent)
            transport = Transport(self.loop, upstream)
            if client.wants(agent):
                self.peers.append(Peer(transport))
                client.connected(upstream)

        self.loop.call_soon(opened)

    def step(self, what: str, size: int) -> None:
        if what == "send":
            self.near.feed(size)
        elif what == "read":
            self.got += self.near.take(size)
        for peer in list(self.peers):
            if what == "take":
                peer.take(size)
            elif what == "answer":
                peer.answer(size)
        self.loop.run()

    def waiting(self) -> list[int]:
        """The most that has ever waited in each buffer of the edge."""
        client = self.near.protocol
        kept = 0
        if isinstance(client, Connection):
            kept = len(client.exchange.body) + len(client.reader.kept or b"")
        return [kept, self.near.most, *(peer.transport.most for peer in self.peers)]

    def finish(self) -> None:
        """Everybody reads and writes until nothing moves."""
        before = None
        while before != (before := self._progress()):
            for what in ("send", "take", "answer", "read"):
                self.step(what, 1 << 30)

    def _progress(self) -> tuple[int, ...]:
        return (
            len(self.got),
            len(self.near.received),
            sum(peer.due + len(peer.transport.sent) for peer in self.peers),
        )


def request(kind: str, answer: int, body: int) -> bytes:
    head = b"Host: a\r\nCookie: dispatcher=" + TOKEN.encode() + b"\r\n"
    if kind == "get":
        return b"GET /%d HTTP/1.1\r\n" % answer + head + b"\r\n"
    if kind == "upgrade":
        lines = b"Connection: Upgrade\r\nUpgrade: websocket\r\nOrigin: http://a\r\n\r\n"
        return b"GET /upgrade/%d HTTP/1.1\r\n" % answer + head + lines + b"y" * body
    return (
        b"POST /%b/%d HTTP/1.1\r\n" % (kind.encode(), answer)
        + head
        + b"Content-Length: %d\r\n\r\n" % body
        + b"y" * body
    )


SIZES = st.sampled_from([0, 1, 100, 16_000, 70_000, 400_000, 1_000_000])
REQUESTS = st.lists(
    st.tuples(st.sampled_from(["get", "get", "post", "early"]), SIZES, SIZES), min_size=1, max_size=8
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "read", "take", "answer"]), st.sampled_from([1, 100, 16_000, 70_000, 1_000_000])
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=REQUESTS, tunnel=st.none() | st.tuples(SIZES, SIZES), steps=STEPS)
def test_whatever_the_order_buffers_are_bounded_and_nobody_hangs(requests, tunnel, steps) -> None:
    world = World()
    for each in requests:
        world.near.received += request(*each)
    if tunnel is not None:
        world.near.received += request("upgrade", *tunnel)
    for step in steps:
        world.step(*step)
        assert max(world.waiting()) <= BOUND
    world.finish()
    assert max(world.waiting()) <= BOUND
    expected = len(requests) + (tunnel is not None)
    answers = world.got.count(b"HTTP/1.1 ")
    if b"Connection: close\r\n" in world.got:
        assert world.near.lost, "the last answer was announced, and the connection ended with it"
    else:
        assert answers == expected and not world.near.received
        assert len(world.got) >= sum(size for _, size, _ in requests) + (tunnel[0] if tunnel else 0)
        assert not any(peer.due for peer in world.peers if not peer.transport.lost)


def test_a_client_that_does_not_read_gets_no_further_request_begun() -> None:
    """One connection: 700 answers that are not read, then one without end."""
    world = World()
    for _ in range(700):
        world.near.received += request("get", 16_000, 0)
        for what in ("send", "take", "answer"):
            world.step(what, 1 << 20)
    world.near.received += request("get", 1 << 30, 0)
    for _ in range(2000):
        for what in ("send", "take", "answer"):
            world.step(what, HIGH)
    assert max(world.waiting()) <= BOUND


def test_requests_that_are_answered_at_once_are_read_no_faster_than_they_are_answered() -> None:
    """A stranger sends small requests without end; a turn of the loop answers one."""
    world, count = World(), 8000
    world.near.received += b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * count
    for _ in range(count + 10):
        if world.near.received and world.near.reading:
            world.near.read(HIGH)
        world.loop.turn()
        world.got += world.near.sent
        world.near.sent.clear()
        assert world.waiting()[0] <= PIPELINED + HIGH
    assert world.got.count(b"HTTP/1.1 401 ") == count


def test_an_upstream_that_has_not_taken_its_request_is_not_used_again() -> None:
    """The agent answers before it has read a body of 100 kB, and never reads it."""
    world = World()
    world.near.received += request("early", 10, 90_000)
    world.step("send", 30_000)
    world.step("send", 1 << 20)
    assert not world.near.received and not world.near.reading
    world.step("take", 1000)
    world.step("answer", 100)
    world.step("read", 1000)
    for _ in range(20):
        world.near.received += request("post", 5, 1_000_000)
    for _ in range(400):
        world.step("send", 1 << 20)
        for peer in world.peers[1:]:
            peer.take(1 << 20)
            peer.answer(1 << 20)
        world.step("read", 1 << 20)
    assert max(world.waiting()) <= BOUND
    assert world.got.count(b"HTTP/1.1 200") == 21
