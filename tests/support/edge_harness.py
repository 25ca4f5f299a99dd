"""The edge in this process, agents made of scripts, and raw clients: what the edge's integration tests share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11

from dispatcher.config.load import parse
from dispatcher.proxy.listeners import Listeners
from dispatcher.proxy.edge.net.handshakes import Handshakes
from dispatcher.proxy.edge.net.listener import Listener
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.routing.settings import Settings
from dispatcher.proxy.edge.worker import Worker
from tests.support.edge_feed import FeedServer, agent_row, session_row

TOKEN = "token-of-alice-0123456789abcdefghijklmnopqr"
BOB = "token-of-bob---0123456789abcdefghijklmnopqr"
COOKIE = b"Cookie: dispatcher=" + TOKEN.encode() + b"\r\n"

Script = Callable[["Connection"], None]


class Connection:
    """One connection that an agent has taken; `head` and `body` read a request."""

    def __init__(self, agent: Agent, sock: socket.socket) -> None:
        self.agent = agent
        self.sock = sock
        self.buffer = b""
        self.requests = 0

    def head(self) -> bytes:
        """Return the next request's head, b"" at the end of the connection."""
        while b"\r\n\r\n" not in self.buffer:
            data = self.sock.recv(262144)
            if not data:
                return b""
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        self.requests += 1
        self.agent.heads.append(head + b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def body(self, head: bytes) -> bytes:
        """Return the body that belongs to a head, chunked bodies as they came."""
        lower = head.lower()
        if b"\r\ntransfer-encoding: chunked\r\n" in lower:
            while not self.buffer.endswith(b"0\r\n\r\n"):
                self.more()
            body, self.buffer = self.buffer, b""
            return body
        _, _, rest = lower.partition(b"\r\ncontent-length: ")
        length = int(rest.partition(b"\r\n")[0]) if rest else 0
        while len(self.buffer) < length:
            self.more()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return body

    def more(self) -> None:
        data = self.sock.recv(262144)
        if not data:
            raise EOFError
        self.buffer += data

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)


def echo(connection: Connection) -> None:
    """Answer each request with its head (and body) as the body."""
    while head := connection.head():
        text = head + connection.body(head)
        connection.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        )


def saying(answer: bytes, *, close: bool = False) -> Script:
    """Return a script that gives one answer to every request."""

    def script(connection: Connection) -> None:
        while head := connection.head():
            connection.body(head)
            connection.send(answer)
            if close:
                return

    return script


class Agent:
    """A server of scripts on TCP or on a Unix socket; `heads` are the request heads that it got."""

    def __init__(self, script: Script, path: str = "") -> None:
        self.script = script
        self.heads: list[bytes] = []
        self.connections: list[socket.socket] = []
        self.opened = 0
        if path:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.bind(path)
            self.endpoint = f"unix:{path}"
        else:
            self.sock = socket.socket()
            self.sock.bind(("127.0.0.1", 0))
            self.endpoint = f"tcp:127.0.0.1:{self.sock.getsockname()[1]}"
        self.sock.listen(512)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            self.opened += 1
            self.connections.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            self.script(Connection(self, sock))
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        for sock in self.connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                sock.close()


class Edge:
    """One worker in a thread, with a feed, a portal that is a script, and an agent of alice's."""

    def __init__(
        self,
        script: Script = echo,
        *,
        portal: Script = echo,
        tls: ssl.SSLContext | None = None,
        data: dict[str, Any] | None = None,
        log_fd: int | None = None,
        agent_state: str = "running",
        label: str = "",
        host: str = "",
        **proxy: Any,
    ) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="edge-", dir="/tmp"))
        self.feed = FeedServer(str(self.dir / "feed.sock"))
        self.agent = Agent(script)
        self.portal = Agent(portal, str(self.dir / "portal.sock"))
        self.feed.agents["alice"] = agent_row("alice", self.agent.endpoint, agent_state, label=label)
        row = session_row(TOKEN, "alice")
        self.feed.sessions[row["sha256"]] = {**row, **({"host": host} if host else {})}
        self.feed.start()
        config = parse({"proxy": {"body_timeout": 5, **proxy}, **(data or {})})
        self.settings = Settings(config)
        self._tls = tls
        self._log_fd = log_fd
        self._ready = threading.Event()
        self.errors: list[dict[str, Any]] = []
        self.loop: asyncio.AbstractEventLoop
        self.worker: Worker
        self.port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10), "the edge did not start"

    def _run(self) -> None:
        import uvloop

        self.loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(context))
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        self.worker = Worker(
            self.settings, str(self.dir / "feed.sock"), str(self.dir / "portal.sock"), AccessLog(self._log_fd)
        )
        self.worker.start(self.loop)
        await self.worker.feed.first(5)
        listeners = Listeners()
        listeners.update({"proxy.listen": ["127.0.0.1:0"]})
        (sock,) = listeners.of("proxy.listen")
        self.port = sock.getsockname()[1]
        clients = self.worker.clients
        server = Handshakes(clients, sock, self._tls, header=False) if self._tls else Listener(clients, sock)
        server.start()
        self._stop = asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        server.close()
        self.worker.close()
        await asyncio.sleep(0.05)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self.feed.stop()
        self.agent.close()
        self.portal.close()
        shutil.rmtree(self.dir, ignore_errors=True)
        unexpected = [e for e in self.errors if not isinstance(e.get("exception"), (OSError, ssl.SSLError))]
        assert not unexpected, unexpected

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def do(self, function: Callable[[], Any]) -> Any:
        """Run something in the edge's thread and return what it returns."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def connect(self, timeout: float = 10.0) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, data: bytes, *, timeout: float = 10.0, shut: bool = False) -> bytes:
        """Send raw bytes and return all that comes until the edge closes, or until `timeout` without a byte."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            if shut:
                sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def get(
        self, path: str = "/", *lines: bytes, cookie: bytes = COOKIE, method: str = "GET", **kw: Any
    ) -> Answer:
        """Send one request, read one answer."""
        head = f"{method} {path} HTTP/1.1\r\nHost: app.test\r\n".encode() + cookie
        head += b"".join(line + b"\r\n" for line in lines) + b"\r\n"
        with self.connect() as sock:
            sock.sendall(head + kw.get("body", b""))
            return read_answer(sock, method)


def read_all(sock: socket.socket) -> bytes:
    received = b""
    try:
        while data := sock.recv(262144):
            received += data
    except (TimeoutError, ConnectionResetError):
        pass
    return received


class Answer:
    """A final answer, read by h11: an independent judge of what the edge sends."""

    def __init__(
        self, response: h11.Response, body: bytes, trailers: list[tuple[bytes, bytes]], ended: bool
    ) -> None:
        self.status = response.status_code
        self.reason = bytes(response.reason)
        self.fields = [(bytes(name), bytes(value)) for name, value in response.headers]
        self.body = body
        self.trailers = trailers
        self.ended = ended

    def field(self, name: bytes) -> bytes | None:
        values = [value for key, value in self.fields if key == name.lower()]
        return b", ".join(values) if values else None


class Reader:
    """Reads answers from a connection with h11, one after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""
        self.informational: list[int] = []

    def answer(self, method: str = "GET") -> Answer:
        judge = h11.Connection(h11.CLIENT)
        judge.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        judge.send(h11.EndOfMessage())
        if self.rest:
            judge.receive_data(self.rest)
        response = None
        body = b""
        while True:
            event = judge.next_event()
            if event is h11.NEED_DATA:
                judge.receive_data(self.sock.recv(262144))
            elif isinstance(event, h11.InformationalResponse):
                self.informational.append(event.status_code)
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.rest = judge.trailing_data[0]
                assert response is not None
                return Answer(response, body, [(bytes(n), bytes(v)) for n, v in event.headers], True)
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise AssertionError(f"no answer: {event}")


def read_answer(sock: socket.socket, method: str = "GET") -> Answer:
    return Reader(sock).answer(method)


def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """Return what a condition returns once it is true."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            assert value, "it never came true"
            return value
        time.sleep(0.01)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
