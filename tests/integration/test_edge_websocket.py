"""WebSockets through the edge: with a real client and server library, and byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

from tests.support.edge_feed import agent_row
from tests.support.edge_harness import (
    COOKIE,
    TOKEN,
    Connection,
    Edge,
    Reader,
    descriptors,
    eventually,
    read_all,
    saying,
)

HOST = b"Host: app.test\r\n"
UPGRADE = (
    b"GET /ws HTTP/1.1\r\n" + HOST + COOKIE + b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
PING = b"\x89\x80\0\0\0\0"
TEXT = b"\x81\x85\0\0\0\0hello"


def echo(connection: Connection) -> None:
    connection.head()
    connection.send(SWITCH)
    while data := connection.buffer or connection.sock.recv(65536):
        connection.buffer = b""
        connection.send(data)


class Library:
    """An echo server of the websockets library in a thread."""

    def __init__(self) -> None:
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()

        async def handler(peer) -> None:
            async for message in peer:
                await peer.send(message)

        async with serve(
            handler, "127.0.0.1", 0, max_size=2**28, ping_interval=None, subprotocols=["b", "a"]
        ) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


@pytest.fixture(scope="module")
def library():
    with Edge() as edge:
        server = Library()
        edge.feed.add(agents=(agent_row("alice", f"tcp:127.0.0.1:{server.port}"),))
        eventually(lambda: str(server.port) in edge.worker.context.tables.agents["alice"].endpoint)
        yield edge
        server.close()


def talk(edge: Edge, conversation, **kw):
    async def run():
        async with connect(
            f"ws://127.0.0.1:{edge.port}/ws",
            additional_headers={"Cookie": f"dispatcher={TOKEN}"},
            origin=f"http://127.0.0.1:{edge.port}",
            max_size=2**28,
            ping_interval=None,
            **{"subprotocols": ["b"], **kw},
        ) as peer:
            return await conversation(peer)

    return asyncio.run(run())


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_messages_of_every_size(library, compression):
    async def conversation(peer):
        for size in (0, 1, 125, 126, 127, 65535, 65536, 1_000_000):
            for message in ("x" * size, os.urandom(size)):
                await peer.send(message)
                assert await peer.recv() == message

    talk(library, conversation, compression=compression)


def test_fragments_pings_subprotocols_and_close_codes(library):
    async def conversation(peer):
        assert peer.subprotocol == "b"
        await peer.send(["frag", "ment", "ed"])
        assert await peer.recv() == "fragmented"
        await asyncio.wait_for(await peer.ping(b"are you there"), 5)
        await peer.close(4321, "enough")
        assert (peer.close_code, peer.close_reason) == (4321, "enough")

    talk(library, conversation, subprotocols=["a", "b"])


def test_a_message_of_100_mb(library):
    async def conversation(peer):
        message = os.urandom(1 << 20) * 100
        sending = asyncio.ensure_future(peer.send(message))
        assert await peer.recv() == message
        await sending

    talk(library, conversation, compression=None)


def test_a_websocket_without_a_session_is_refused(library):
    for cookie in ("dispatcher=nonsense-that-is-long-enough", ""):
        with pytest.raises(websockets.exceptions.InvalidStatus) as caught:

            async def run(cookie=cookie):
                async with connect(f"ws://127.0.0.1:{library.port}/ws", additional_headers={"Cookie": cookie}):
                    pass

            asyncio.run(run())
        assert caught.value.response.status_code == 401


def test_the_agent_sees_a_clean_upgrade():
    with Edge(echo) as edge, edge.connect() as sock:
        sock.sendall(UPGRADE + TEXT)
        received = b""
        while not received.endswith(TEXT):
            received += sock.recv(1000)
        assert (
            received.startswith(b"HTTP/1.1 101 ")
            and b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in received
        )
        (head,) = edge.agent.heads
        assert head.count(b"Connection: Upgrade\r\nUpgrade: websocket\r\n") == 1 and b"keep-alive" not in head
        assert b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" in head and TOKEN.encode() not in head
        assert b"X-Dispatcher-User: alice\r\n" in head


def test_a_non_101_answer_to_an_upgrade_is_passed_on():
    refusal = b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nContent-Length: 4\r\n\r\nnope"
    with Edge(saying(refusal)) as edge, edge.connect() as sock:
        for _ in range(2):
            sock.sendall(UPGRADE)
            answer = Reader(sock).answer()
            assert (answer.status, answer.body) == (426, b"nope")


def test_a_reset_in_mid_frame_ends_both_sides():
    ended = threading.Event()

    def script(connection: Connection) -> None:
        connection.head()
        connection.send(SWITCH)
        while connection.sock.recv(1000):
            pass
        ended.set()

    with Edge(script) as edge:
        sock = edge.connect()
        sock.sendall(UPGRADE)
        assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        sock.sendall(TEXT[:7])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        assert ended.wait(5)
        eventually(lambda: len(edge.worker.clients.tunnels) == 0 and edge.worker.clients.open == 0)


def test_the_close_frame_of_an_agent_that_closes_at_once_reaches_the_client():
    closed = b"\x88\x08\x0f\xa1reason"  # code 4001

    def script(connection: Connection) -> None:
        connection.head()
        connection.send(SWITCH)
        connection.sock.recv(1000)
        connection.send(closed)
        connection.sock.close()  # what the client still sends meets an error

    received = []
    with Edge(script) as edge:
        for _ in range(40):
            with edge.connect() as sock:
                sock.settimeout(5)
                sock.sendall(UPGRADE)
                assert sock.recv(1000).startswith(b"HTTP/1.1 101")
                with contextlib.suppress(ConnectionError):
                    for _ in range(50):
                        sock.sendall(TEXT * 1000)
                received.append(read_all(sock))
    assert received == [closed] * 40


def test_an_agent_that_dies_ends_the_websocket():
    with Edge(lambda connection: (connection.head(), connection.send(SWITCH))) as edge:
        assert edge.ask(UPGRADE, timeout=5).startswith(b"HTTP/1.1 101")
        eventually(lambda: len(edge.worker.clients.tunnels) == 0)


def test_half_close_is_passed_on():
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(SWITCH)
        while connection.sock.recv(1000):
            pass
        connection.send(b"\x81\x03bye")

    with Edge(script) as edge:
        assert edge.ask(UPGRADE, timeout=5, shut=True).endswith(b"\x81\x03bye")


def test_silence_is_not_an_end():
    with (
        Edge(echo, idle_timeout=0.5, body_timeout=0.5, upstream_timeout=0.5, head_timeout=0.5) as edge,
        edge.connect() as sock,
    ):
        sock.sendall(UPGRADE)
        assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        time.sleep(2.5)
        sock.sendall(TEXT)
        assert sock.recv(1000) == TEXT


def test_a_reader_that_stops_holds_the_agent_back():
    sent = [0]

    def script(connection: Connection) -> None:
        connection.head()
        connection.send(SWITCH)
        connection.sock.settimeout(1)
        piece = b"\x82\x7e\x03\xe8" + b"x" * 1000
        while sent[0] < 100_000_000:
            connection.send(piece * 100)
            sent[0] += len(piece) * 100

    with Edge(script) as edge, edge.connect() as sock:
        sock.sendall(UPGRADE)
        sock.recv(10)
        time.sleep(2)
        assert sent[0] < 60_000_000


def test_pings_are_idle_and_typing_is_use():
    with Edge(echo) as edge, edge.connect() as sock:
        sock.sendall(UPGRADE)
        assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        edge.do(edge.worker.report)
        edge.feed.wait_for(lambda frame: frame["type"] == "activity")
        for _ in range(20):
            sock.sendall(PING)
            sock.recv(1000)
        edge.do(edge.worker.report)
        report = eventually(lambda: edge.feed.of_type("activity")[1:])[0]["agents"]["alice"]
        assert report["idle_sockets"] == 1 and "stream" not in report and "use" not in report
        sock.sendall(TEXT)
        sock.recv(1000)
        edge.do(edge.worker.report)
        report = eventually(lambda: edge.feed.of_type("activity")[2:])[0]["agents"]["alice"]
        assert report["stream"] == len(TEXT)


def test_typing_wakes_a_suspended_agent_and_pings_do_not():
    with Edge(echo) as edge, edge.connect() as sock:
        sock.sendall(UPGRADE)
        assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        edge.feed.add(agents=(agent_row("alice", edge.agent.endpoint, "asleep"),))
        eventually(lambda: edge.worker.context.tables.agents["alice"].state == "asleep")
        sock.sendall(PING)
        assert sock.recv(1000) == PING, "the connection to a sleeping agent stays"
        assert not edge.feed.of_type("wake")
        sock.sendall(TEXT)
        edge.feed.wait_for(lambda frame: frame == {"type": "wake", "agent": "alice"})


def test_revocation_puts_its_close_frame_between_two_frames():
    big = b"\x82\x7f\0\0\0\0\0\x10\0\0" + b"x" * 500_000  # half of a frame

    def script(connection: Connection) -> None:
        connection.head()
        connection.send(SWITCH + big)
        connection.sock.recv(10)

    with Edge(script) as edge, edge.connect() as sock:
        sock.sendall(UPGRADE)
        received = sock.recv(1000)
        while len(received) < 500_000:
            received += sock.recv(100_000)
        edge.feed.remove(tokens=(TOKEN,))
        received += read_all(sock)
        assert received.partition(b"\r\n\r\n")[2] == big, "no Close frame inside a frame"


def test_draining_says_going_away():
    with Edge(echo) as edge, edge.connect() as sock:
        sock.sendall(UPGRADE)
        assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        edge.do(edge.worker.clients.shut_tunnels)
        assert read_all(sock) == b"\x88\x02\x03\xe9"
        eventually(lambda: edge.worker.clients.open == 0)


@pytest.mark.slow
def test_thousands_of_idle_websockets_end_at_once():
    count = 2000
    with Edge(saying(b""), in_flight_per_agent=count) as edge:

        class Silent(asyncio.Protocol):
            def connection_made(self, transport):
                self.transport = transport

            def data_received(self, data):
                self.transport.write(SWITCH)

        servers = []

        async def listen():
            servers.append(await edge.loop.create_server(Silent, "127.0.0.1", 0, backlog=4096))

        asyncio.run_coroutine_threadsafe(listen(), edge.loop).result(5)
        port = servers[0].sockets[0].getsockname()[1]
        edge.feed.add(agents=(agent_row("alice", f"tcp:127.0.0.1:{port}"),))
        eventually(lambda: str(port) in edge.worker.context.tables.agents["alice"].endpoint)
        before = descriptors()
        socks = []
        for _ in range(count):
            sock = edge.connect(20)
            sock.sendall(UPGRADE)
            socks.append(sock)
        for sock in socks:
            assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        assert len(edge.worker.clients.tunnels) == count
        start = time.monotonic()
        edge.feed.remove(tokens=(TOKEN,))
        for sock in socks:
            assert read_all(sock) == b"\x88\x02\x03\xf0"
        assert time.monotonic() - start < 4
        for sock in socks:
            sock.close()
        eventually(lambda: edge.worker.clients.open == 0, 10)
        eventually(lambda: descriptors() <= before + 10, 10)
        edge.do(servers[0].close)
