"""The HTTP server of a listener: asyncio for connections, h11 for the protocol, threads for the application.

One thread accepts, and receives each request whole before the application gets it: a client that sends slowly
occupies a socket for a bounded time, but no thread.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import h11

from dispatcher.common import problem
from dispatcher.common.ip_limits import Tally
from dispatcher.common.log import logger
from dispatcher.common.peer_credentials import peer_credentials
from dispatcher.manager.backends.pool import Pool

BACKLOG = 256
MAX_CONNECTIONS = 1000  # of one listener, idle ones included
MAX_OF_ADDRESS = 250  # of them from one address
MAX_HEAD = 32768  # bytes
MAX_BODY = 65536  # bytes
PATIENCE = 20.0  # seconds for a handshake, for a request after it or after the last answer, and to send an answer
LINGER = 1.0  # seconds for the client to close the connection after the last answer
STOP_TIMEOUT = 3.0  # seconds for requests in flight when the manager ends
QUIET = 10.0  # seconds between two lines of the log about the same, for each listener
_CHUNK = 65536  # bytes
_TLS_CHUNK = 4096  # bytes of TLS that are decrypted in one turn of the loop
_TLS_MOST = 32768  # bytes of TLS without any data in them; a record has at most half of that
_TLS_HANDSHAKE = 131072  # bytes of a handshake, a client's chain of certificates included

Environ = dict[str, Any]
WsgiApp = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]
_T = TypeVar("_T")
Answer = tuple[int, list[tuple[str, str]], bytes]

_log = logger("manager.http")


class _Refused(Exception):
    """A request that the application does not get."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Server:
    """Serves one WSGI application on one bound socket.

    The environment has two keys of its own: ``dispatcher.peer``, user and group id of the process at the other end
    of a Unix socket, and ``dispatcher.certified``, whether a client certificate was verified.

    :param threads: of the application, at most.
    :ivar context: of TLS; may be replaced while serving: new connections use the new one.
    """

    def __init__(
        self, sock: socket.socket, app: WsgiApp, threads: int, context: ssl.SSLContext | None = None
    ) -> None:
        self.socket = sock
        self.context = context
        self._app = app
        self._pool = Pool("dispatcher-http", threads)
        self._seldom = _Seldom()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="dispatcher-accept", daemon=True)
        self._addresses = Tally()
        self._connections: set[asyncio.Task[None]] = set()
        self._busy: set[asyncio.Task[None]] = set()  # those with a request in flight
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Listen, and serve in a new thread."""
        self.socket.listen(BACKLOG)
        self.socket.setblocking(False)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; requests in flight have `STOP_TIMEOUT` to finish."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._pool.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        accepting = self._loop.create_task(self._accept())
        await self._stopping.wait()
        accepting.cancel()
        for task in self._connections - self._busy:
            task.cancel()
        await asyncio.wait([accepting, *self._connections], timeout=STOP_TIMEOUT)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(accepting, *self._connections, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                sock, where = await self._loop.sock_accept(self.socket)
            except OSError as error:
                self._seldom(_log.warning, "cannot accept a connection", why=str(error))
                await asyncio.sleep(0.2)
                continue
            address = str(where[0]) if self.context else ""
            if len(self._connections) >= MAX_CONNECTIONS:
                self._seldom(_log.warning, "too many connections", most=MAX_CONNECTIONS, address=address)
                sock.close()
                continue
            if address and self._addresses.of(address) >= MAX_OF_ADDRESS:
                event = "too many connections from one address"
                self._seldom(_log.warning, event, most=MAX_OF_ADDRESS, address=address)
                sock.close()
                continue
            self._addresses.add(address)
            task = self._loop.create_task(self._connected(sock, address))
            self._connections.add(task)
            task.add_done_callback(functools.partial(self._forget, sock, address))

    def _forget(self, sock: socket.socket, address: str, task: asyncio.Task[None]) -> None:
        sock.close()
        self._connections.discard(task)
        self._addresses.drop(address)

    async def _connected(self, sock: socket.socket, address: str) -> None:
        """Serve one connection to its end."""
        stream = _Stream(self._loop, sock, self.context)
        http = _Http(stream)
        environ: Environ = {"REMOTE_ADDR": address, "wsgi.url_scheme": "https" if self.context else "http"}
        try:
            if sock.family == socket.AF_UNIX:
                environ["dispatcher.peer"] = peer_credentials(sock)[1:]
            # With a certificate that is not signed by `client_ca` the handshake fails.
            environ["dispatcher.certified"] = await asyncio.wait_for(stream.handshake(), PATIENCE)
            while await self._exchange(http, environ):
                pass
            with suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(stream.end(), LINGER)
        except asyncio.TimeoutError:
            if not http.is_idle:
                event = "a connection sent no request in time"
                self._seldom(_log.info, event, address=address, seconds=PATIENCE)
        except ssl.SSLError as error:
            self._seldom(_log.info, "a TLS handshake failed", address=address, why=str(error))
        except OSError as error:
            _log.debug("a connection broke", address=address, why=str(error))
        except h11.ProtocolError as error:
            self._seldom(_log.warning, "an answer cannot be sent", address=address, why=str(error))
        except Exception:
            self._seldom(_log.exception, "a connection failed", address=address)

    async def _exchange(self, http: _Http, environ: Environ) -> bool:
        """Receive a request and answer it; return whether the connection can be used again."""
        try:
            request = await asyncio.wait_for(http.receive(), PATIENCE)
        except _Refused as error:
            await http.send(_problem(error.status, str(error)))
            return False
        if request is None:
            return False
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            await http.send(await self._call({**request, **environ}))
        finally:
            self._busy.discard(task)
        return http.again() and not self._stopping.is_set()

    async def _call(self, environ: Environ) -> Answer:
        """Return the application's answer, from a thread."""
        future: asyncio.Future[Answer] = self._loop.create_future()

        def finish(answer: Answer) -> None:
            if not future.done():
                future.set_result(answer)

        def run() -> None:
            try:
                answer = _answer(self._app, environ)
            except BaseException:  # SystemExit too: it would end the loop
                _log.exception("a request failed")
                answer = _problem(500, "the manager's log has the reason")
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(finish, answer)

        self._pool.submit(run)
        return await future


class _Seldom:
    """Logs each event that strangers cause at most once in `QUIET` seconds, with how often it happened."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}
        self._count: Counter[str] = Counter()

    def __call__(self, log: Callable[..., object], event: str, **values: object) -> None:
        """Log an event, or count it."""
        now = time.monotonic()
        self._count[event] += 1
        if now - self._logged.get(event, -QUIET) >= QUIET:
            self._logged[event] = now
            log(event, **values, count=self._count.pop(event))


class _Stream:
    """The bytes of a connection, inside TLS if there is a context.

    In place of asyncio's own TLS, which sends no alert when a handshake fails: the client would not learn why.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True) if context else None

    async def handshake(self) -> bool:
        """Finish the handshake, if any; return whether the client has shown a certificate."""
        if self._tls is None:
            return False
        await self._repeated(self._tls.do_handshake, _TLS_HANDSHAKE)
        return bool(self._tls.getpeercert())

    async def receive(self) -> bytes:
        """Return the next bytes; none when the client has ended."""
        if self._tls is None:
            return await self._loop.sock_recv(self._socket, _CHUNK)
        try:
            return await self._repeated(functools.partial(self._tls.read, _CHUNK))
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        if self._tls is None:
            await self._loop.sock_sendall(self._socket, data)
        elif data:
            await self._repeated(functools.partial(self._tls.write, data))

    async def end(self) -> None:
        """End the sending side, then discard what the client still sends: else it might not see the answer."""
        if self._tls is not None:
            with suppress(ssl.SSLError):
                self._tls.unwrap()
            await self._flush()
        self._socket.shutdown(socket.SHUT_WR)
        while await self._loop.sock_recv(self._socket, _CHUNK):
            pass

    async def _repeated(self, step: Callable[[], _T], most: int = _TLS_MOST) -> _T:
        """Repeat a step of TLS until it has all bytes that it needs; return its result.

        Messages of TLS itself (KeyUpdate; RFC 8446, 4.6.3) need many and have no result: others get their turn
        after each `_TLS_CHUNK` bytes.

        :raises ssl.SSLError: `most` bytes were not enough.
        """
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                if most <= 0:
                    raise ssl.SSLError("too many messages of TLS without data") from None
                await asyncio.sleep(0)
                if data := await self._loop.sock_recv(self._socket, _TLS_CHUNK):
                    self._incoming.write(data)
                    most -= len(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                await self._flush()  # the alert
                raise
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._loop.sock_sendall(self._socket, data)


class _Http:
    """The exchanges of a connection: bytes to WSGI's environment, answers to bytes."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._state = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._bodiless = False  # the answer to HEAD

    async def receive(self) -> Environ | None:
        """Return the next request; None: the client has closed the connection.

        :raises _Refused: it is not valid, or too large.
        """
        environ: Environ = {}
        body = bytearray()
        self._bodiless = False
        while True:
            event = await self._event()
            if isinstance(event, h11.Request):
                self._bodiless = event.method == b"HEAD"
                environ = _environ(event)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_BODY:
                    raise _too_large()
            elif isinstance(event, h11.EndOfMessage):
                return environ | {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
            else:
                return None

    async def _event(self) -> object:
        try:
            while (event := self._state.next_event()) is h11.NEED_DATA:
                if self._state.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                self._state.receive_data(await self._stream.receive())
        except h11.RemoteProtocolError as error:
            raise _Refused(error.error_status_hint, str(error)) from error
        return event

    async def send(self, answer: Answer) -> None:
        """Send an answer."""
        status, headers, body = answer
        fields = [*headers, ("Date", formatdate(usegmt=True))]
        if not any(name.lower() == "content-length" for name, _ in headers):
            fields.append(("Content-Length", str(len(body))))
        if self._state.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return  # the request broke off where no answer can follow
        await self._send(h11.Response(status_code=status, headers=fields, reason=HTTPStatus(status).phrase))
        for start in range(0, 0 if self._bodiless else len(body), _CHUNK):
            await self._send(h11.Data(data=body[start : start + _CHUNK]))
        await self._send(h11.EndOfMessage())

    async def _send(self, event: Any) -> None:
        await asyncio.wait_for(self._stream.send(self._state.send(event) or b""), PATIENCE)

    @property
    def is_idle(self) -> bool:
        """Whether nothing of the next request has arrived."""
        return self._state.their_state is h11.IDLE and not self._state.trailing_data[0]

    def again(self) -> bool:
        """Whether another request can follow, then received by `receive`."""
        if self._state.our_state is not h11.DONE or self._state.their_state is not h11.DONE:
            return False
        self._state.start_next_cycle()
        return True


def _problem(status: int, why: str) -> Answer:
    document = problem.document(status, HTTPStatus(status).phrase, why)
    headers = [("Content-Type", problem.MEDIA_TYPE), ("Connection", "close")]
    return status, headers, json.dumps(document).encode()


def _too_large() -> _Refused:
    return _Refused(413, f"a body has at most {MAX_BODY} bytes")


def _environ(request: h11.Request) -> Environ:
    """Return WSGI's environment (PEP 3333) of a request, without its body.

    :raises _Refused: its target is not a path, its head or body too long, or the body's length said in two ways.
    """
    if len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers) > MAX_HEAD:
        raise _Refused(431, f"a head has at most {MAX_HEAD} bytes")  # h11 checks only one that is not complete
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
        raise _Refused(400, "Content-Length and Transfer-Encoding exclude each other")
    if request.http_version not in {b"1.0", b"1.1"}:
        raise _Refused(505, "the version is not HTTP/1.0 or HTTP/1.1")
    path, _, query = request.target.partition(b"?")
    if not path.startswith(b"/"):
        raise _Refused(400, "the target of a request is a path")
    found: Environ = {
        "REQUEST_METHOD": request.method.decode("ascii"),
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query.decode("latin-1"),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "0",
        "SERVER_PROTOCOL": f"HTTP/{request.http_version.decode('ascii')}",
        "wsgi.version": (1, 0),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in request.headers:
        if b"_" in name:
            continue  # in the environment it could not be told from a hyphen
        key = name.decode("ascii").upper().replace("-", "_")
        if key == "CONTENT_LENGTH" and int(value) > MAX_BODY:
            raise _too_large()
        if key in {"CONTENT_LENGTH", "TRANSFER_ENCODING"}:
            continue  # the body is complete
        if key != "CONTENT_TYPE":
            key = f"HTTP_{key}"
        text = value.decode("latin-1")
        found[key] = f"{found[key]},{text}" if key in found else text
    return found


def _answer(app: WsgiApp, environ: Environ) -> Answer:
    head: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], *_: object) -> None:
        head[:] = [int(status[:3]), headers]

    pieces = app(environ, start_response)
    try:
        body = b"".join(pieces)
    finally:
        if hasattr(pieces, "close"):
            pieces.close()
    return head[0], head[1], body
