"""A small HTTP/1.1 server on asyncio and httptools.  Touches sockets; knows nothing of notes and clocks.

One request at a time per connection, bodies streamed both ways with back-pressure, WebSockets by `Upgrade`.
Meant to stand behind a proxy: it has no TLS and no time-outs of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote

import httptools

from dispatcher.demo import websocket

MAX_HEAD = 64 * 1024
HIGH_WATER = 256 * 1024
Receive = Callable[["Socket"], Awaitable[None]]
Handler = Callable[["Request"], Awaitable["Response"]]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Response:
    """An answer: `body` in memory, or `length` bytes of `file` from its current position; or a WebSocket.

    :ivar websocket: called with the open socket after the upgrade; its end ends the connection.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: BinaryIO | None = None
    length: int = 0
    websocket: Receive | None = None


class Request:
    """What a client asks; `body` yields the chunks as they arrive."""

    def __init__(self, connection: Connection) -> None:
        self.method = ""
        self.target = ""
        self.fields: list[tuple[str, str]] = []
        self.upgrade = False
        self.keep_alive = True
        self._connection = connection
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._done = False
        self._discard = False

    @property
    def path(self) -> str:
        """The path, percent-decoded."""
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict[str, str]:
        """The query's fields; the last of equal names."""
        return dict(parse_qsl(self.target.partition("?")[2]))

    @property
    def headers(self) -> Mapping[str, str]:
        """Header fields by lower-case name, repeated ones joined (RFC 9110 section 5.3)."""
        joined: dict[str, str] = {}
        for name, value in self.fields:
            joined[name] = f"{joined[name]}, {value}" if name in joined else value
        return joined

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body.

        :raises ConnectionError: the client left in the middle.
        """
        if self.headers.get("expect", "").lower() == "100-continue" and self._chunks.empty():
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self._done:
            chunk = await self._chunks.get()
            if chunk is None:
                self._done = True
            else:
                self._connection.consumed(len(chunk))
                yield chunk

    async def read(self, limit: int) -> bytes | None:
        """Return the whole body, or None when it is longer than `limit` bytes."""
        data = bytearray()
        async for chunk in self.body():
            data += chunk
            if len(data) > limit:
                return None
        return bytes(data)

    def received(self, chunk: bytes | None) -> None:
        """Take a chunk from the connection; None ends the body."""
        if self._discard and chunk is not None:
            self._connection.consumed(len(chunk))
        else:
            self._chunks.put_nowait(chunk)

    async def finish(self) -> None:
        """Throw away what is left of the body."""
        self._discard = True
        async for _ in self.body():
            pass


class Socket:
    """An open WebSocket."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._decoder = websocket.Decoder()
        self._messages: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self.open = True

    async def send(self, text: str) -> None:
        """Send a text message; waits while the client does not read."""
        self._connection.write(websocket.encode(websocket.TEXT, text.encode()))
        await self._connection.drain()

    async def receive(self) -> str | bytes | None:
        """Return the next message; None once the socket is closed."""
        return await self._messages.get() if self.open or not self._messages.empty() else None

    def feed(self, data: bytes) -> None:
        """Take bytes from the connection."""
        try:
            for message in self._decoder.feed(data):
                if message.opcode == websocket.TEXT:
                    self._messages.put_nowait(message.payload.decode())
                elif message.opcode == websocket.BINARY:
                    self._messages.put_nowait(message.payload)
                elif message.opcode == websocket.PING:
                    self._connection.write(websocket.encode(websocket.PONG, message.payload))
                elif message.opcode == websocket.CLOSE:
                    self.close(1000)
        except websocket.ProtocolError as error:
            self.close(error.code, str(error))

    def close(self, code: int, reason: str = "") -> None:
        """Say good-bye and close the connection; idempotent."""
        if self.open:
            self._connection.write(websocket.close_frame(code, reason))
            self.ended()
            self._connection.close()

    def ended(self) -> None:
        """Note that the connection is gone."""
        if self.open:
            self.open = False
            self._messages.put_nowait(None)


class Connection(asyncio.Protocol):
    """One client's connection.

    :param handler: answers a request; its exceptions become 500.
    :param connections: registers itself there while it is open.
    """

    _transport: asyncio.Transport

    def __init__(self, handler: Handler, connections: set[Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._parser = httptools.HttpRequestParser(self)
        self._requests: asyncio.Queue[Request | None] = asyncio.Queue()
        self._request = Request(self)
        self._socket: Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._head = self._buffered = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._broken = False
        self._complete = True  # no message is half received
        self._rest = b""

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._connections.add(self)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._writable.set()
        if self._socket:
            self._socket.ended()
        if self._task and not self._socket:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._socket:
            self._socket.feed(data)
            return
        if self._broken:
            return
        try:
            self._head += len(data)
            self._parser.feed_data(data)
            if self._head > MAX_HEAD:
                raise httptools.HttpParserError("the head is too long")
        except httptools.HttpParserUpgrade as upgrade:
            self._broken = True  # the parser has ended; what follows belongs to the other protocol
            self._rest = data[upgrade.args[0] :]
            self._requests.put_nowait(None)
        except httptools.HttpParserError:
            self._broken = True
            if self._request.method:
                self._transport.abort()  # in the middle of a body: nobody can tell what was meant
                return
            self._request.keep_alive = False
            self._requests.put_nowait(self._request)
            self._requests.put_nowait(None)

    def eof_received(self) -> bool:
        self._requests.put_nowait(None)
        return self._complete and self._socket is None  # answer what was asked, then close

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # httptools

    def on_message_begin(self) -> None:
        self._complete = False
        self._request = Request(self)

    def on_url(self, url: bytes) -> None:
        self._request.target += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.fields.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method().decode()
        request.upgrade = self._parser.should_upgrade()
        request.keep_alive = self._parser.should_keep_alive() and not request.upgrade
        self._head = 0
        self._requests.put_nowait(request)

    def on_body(self, body: bytes) -> None:
        self._head = 0
        self._buffered += len(body)
        if self._buffered > HIGH_WATER:
            self._transport.pause_reading()
        self._request.received(body)

    def on_message_complete(self) -> None:
        self._head = 0
        self._complete = True
        self._request.received(None)
        self._request = Request(self)

    # for requests and sockets

    def consumed(self, size: int) -> None:
        """Note that `size` bytes of a body were used up."""
        self._buffered -= size
        if self._buffered <= HIGH_WATER // 2 and not self._transport.is_closing():
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        await self._writable.wait()

    def close(self) -> None:
        """Send what is buffered, then close."""
        self._transport.close()

    def shut_down(self) -> None:
        """End politely, as the program ends."""
        if self._socket:
            self._socket.close(1001, "the app is stopping")
        self.close()

    # one request after the other

    async def _serve(self) -> None:
        try:
            while (request := await self._requests.get()) is not None:
                response = await self._answer(request)
                if response.websocket:
                    await self._open(request, response.websocket)
                    break
                await self._send(request, response)
                if not request.keep_alive:
                    break
                await request.finish()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.close()

    async def _answer(self, request: Request) -> Response:
        if not request.method:
            return Response(400, body=b"Bad request\n")
        try:
            return await self._handler(request)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("%s failed", request.method)
            return Response(500, body=b"Something went wrong; the app's log says what\n")

    async def _send(self, request: Request, response: Response) -> None:
        length = response.length if response.file else len(response.body)
        lines = [f"HTTP/1.1 {response.status} {http.HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        if response.status not in {204, 304}:
            lines.append(f"Content-Length: {length}")
        if not request.keep_alive:
            lines.append("Connection: close")
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
        with response.file or contextlib.nullcontext():
            if request.method == "HEAD" or response.status in {204, 304}:
                self.write(head)
            elif response.file is None:
                self.write(head + response.body)
            else:
                self.write(head)
                if self._transport.is_closing():
                    raise ConnectionResetError("the client left")
                loop = asyncio.get_running_loop()
                await loop.sendfile(self._transport, response.file, response.file.tell(), length)
        await self.drain()

    async def _open(self, request: Request, receive: Receive) -> None:
        key = request.headers.get("sec-websocket-key", "")
        self.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + websocket.accept_key(key).encode() + b"\r\n\r\n"
        )
        self._socket = socket = Socket(self)
        socket.feed(self._rest)
        try:
            await receive(socket)
        finally:
            socket.close(1000)
