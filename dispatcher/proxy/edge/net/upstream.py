"""One connection to an upstream: an agent or the portal.

It serves one request at a time and goes back to its agent's pool in between.  Answers are checked by `response`
and `chunked`; after an invalid answer the connection is closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from enum import Enum
from typing import Final

from dispatcher.proxy.edge.http import response as answers
from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.field_names import BadHead
from dispatcher.proxy.edge.http.fields import head_end
from dispatcher.proxy.edge.http.request import Request
from dispatcher.proxy.edge.http.response import (
    CHUNKED,
    UNTIL_CLOSE,
    Response,
    check_begun,
    client_head,
    parse_response,
)
from dispatcher.proxy.edge.net.context import Context
from dispatcher.proxy.edge.routing.settings import CHUNK_PAUSE, DENSE, MAX_IDLE, MAX_INFORMATIONAL, UNSENT
from dispatcher.proxy.edge.routing.table import Agent

_JOIN: Final = 32768  # a head is joined with a body of up to that many bytes; larger ones are written beside it


class Mode(Enum):
    """The part of an answer that comes next."""

    IDLE = "none: in the pool"
    AWAIT = "its head"
    LENGTH = "a body of known length"
    CHUNKED = "a body in chunks"
    REST = "a body that ends with the connection"


# On the hot path:
_IDLE: Final = Mode.IDLE
AWAIT: Final = Mode.AWAIT
_LENGTH: Final = Mode.LENGTH
_CHUNKED: Final = Mode.CHUNKED
_REST: Final = Mode.REST


class Receiver:
    """The exchange that an answer belongs to; `exchange.Exchange` implements it.

    :ivar rechunk: the answer's body goes out in chunks.
    """

    rechunk: bool

    def answer_head(self, response: Response) -> bytes:
        raise NotImplementedError

    def await_answer(self) -> None: ...
    def deliver(self, data: bytes, size: int) -> None: ...
    def pass_on(self, data: bytes) -> None: ...
    def inform(self, data: bytes) -> None: ...
    def exchanged(self) -> None: ...
    def upgraded(self, upstream: Upstream, response: Response, rest: bytes) -> None: ...
    def upstream_lost(self, *, untouched: bool) -> None: ...
    def upstream_invalid(self, why: str) -> None: ...
    def regulate_reading(self) -> None: ...

    # While it waits for a connection, or for the manager.

    def wants(self, agent: Agent) -> bool:
        raise NotImplementedError

    def connected(self, upstream: Upstream) -> None: ...
    def unreachable(self, agent: Agent) -> None: ...
    def looked_up(self, digest: bytes) -> None: ...


class Upstream:
    """A connection, and the answer on it.

    :ivar generation: of the agent's endpoint when it was opened; :ivar since: when it became idle.
    :ivar client: the exchange that is served, which sets it together with `request` and `mode`.
    :ivar pausing: not read for a while, see `dense_pause`.
    :ivar request_sent: all of the request was passed on.
    :ivar used: it has served a request before, so that its end may be the upstream's time-out of idle connections.
    """

    transport: asyncio.Transport
    request: Request

    def __init__(self, context: Context, agent: Agent) -> None:
        self._context = context
        self.agent = agent
        self.generation = agent.generation
        self.client: Receiver | None = None
        self.mode = _IDLE
        self.left = 0
        self.decoder: Chunked | None = None
        self.partial: bytearray | None = None
        self.response: Response | None = None
        self.informational = 0
        self.since = 0.0
        self.used = self.write_paused = self.reading_paused = self.pausing = self.request_sent = False

    def abandon(self) -> None:
        """Stop serving: the client has gone, or the exchange cannot continue."""
        self.client = None
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)

    def data_received(self, data: bytes) -> None:
        client = self.client
        if client is None:
            # No request was sent.  This must not become the answer to the next one.
            self.transport.abort()
            return
        mode = self.mode
        if mode is AWAIT:
            self._head(client, data)
        elif mode is _LENGTH:
            size = len(data)
            if size < self.left:
                self.left -= size
                client.pass_on(data)
                return
            extra = size > self.left
            client.pass_on(data[: self.left] if extra else data)
            self.complete(not extra)
        elif mode is _CHUNKED:
            self._chunks(client, data)
        elif mode is _REST:
            client.pass_on(b"%x\r\n%b\r\n" % (len(data), data) if client.rechunk else data)

    def _head(self, client: Receiver, data: bytes) -> None:
        settings = self._context.settings
        start = 0
        if self.partial is None:
            end = head_end(data)
            if end < 0:
                self.partial = bytearray(data)
        else:
            start = max(0, len(self.partial) - 3)
            self.partial += data
            end = self.partial.find(b"\r\n\r\n", start)
            if end >= 0:
                end += 4
                data = bytes(self.partial)
                self.partial = None
        size = end if end >= 0 else len(self.partial or b"")
        try:
            if size > settings.head_bytes:
                raise BadHead("a head that is too large")
            if end < 0:
                if self.partial:
                    check_begun(self.partial, start)
                return
            head, rest = (data, b"") if size == len(data) else (data[:size], data[size:])
            method = self.request.method
            policy = settings.policy if self.agent.name else answers.TRUSTED
            response = parse_response(head, settings.head_fields, method, policy)
            if response.status < 200:
                self._informational(client, response, rest)
                return
            self._final(client, response, rest)
        except BadHead as error:
            self.partial = None
            client.upstream_invalid(error.why)

    def _informational(self, client: Receiver, response: Response, rest: bytes) -> None:
        """Forward 1xx (RFC 9110, 15.2), up to a limit."""
        if response.status == 101:
            if not self.request.upgrade or not response.upgraded:
                raise BadHead("101 without a request for it")
            client.upgraded(self, response, rest)
            return
        self.informational += 1
        if self.informational > MAX_INFORMATIONAL:
            raise BadHead("too many informational answers")
        if self.request.version and (response.status != 100 or self.request.expects):
            client.inform(client_head(response, b""))
        if rest:
            self._head(client, rest)

    def _final(self, client: Receiver, response: Response, rest: bytes) -> None:
        self.response = response
        length = response.length
        if length == CHUNKED:
            # Before the client gets anything: chunks that are bad from the start are a bad answer.
            self.decoder = Chunked(plain=not self.request.version)
            first = self.decoder.feed(rest) if rest else b""
        head = client.answer_head(response)
        if length >= 0:
            size = len(rest)
            if size == length:
                client.deliver(head + rest, length)
                self.complete(True)
                return
            if size > length:
                client.deliver(head + rest[:length], length)
                self.complete(False)
                return
            client.await_answer()
            self.mode = _LENGTH
            self.left = length - size
            if size <= _JOIN:
                client.deliver(head + rest, size)
            else:
                client.deliver(head, 0)
                client.pass_on(rest)
        elif length == CHUNKED:
            client.await_answer()
            self.mode = _CHUNKED
            client.deliver(head + first, len(first))
            self._end_of_chunks()
        elif length == UNTIL_CLOSE:
            client.await_answer()
            self.mode = _REST
            if rest and client.rechunk:
                rest = b"%x\r\n%b\r\n" % (len(rest), rest)
            client.deliver(head + rest, len(rest))

    def _chunks(self, client: Receiver, data: bytes) -> None:
        decoder = self.decoder
        assert decoder is not None
        try:
            passed = decoder.feed(data)
        except BadHead as error:
            client.upstream_invalid(error.why)
            return
        if passed:
            client.pass_on(passed)
        context = self._context
        pause = dense_pause(self.agent, len(data), decoder.chunks, context.clock()) if decoder.chunks else 0.0
        if pause:
            self.transport.pause_reading()
            self.pausing = True
            context.loop.call_later(pause, self._end_pause)
        self._end_of_chunks()

    def _end_of_chunks(self) -> None:
        decoder = self.decoder
        if decoder is not None and decoder.done:
            self.complete(not decoder.rest)

    def complete(self, reusable: bool) -> None:
        """End the exchange: the whole answer has been forwarded."""
        client = self.client
        response = self.response
        if client is None or response is None:
            return
        self.client = self.response = self.decoder = None
        self.mode = _IDLE
        agent = self.agent
        idle = agent.idle
        if self.write_paused or (self.request.length and self.transport.get_write_buffer_size()):
            self.transport.abort()  # it has not taken all of the request, and may never
        elif (
            not reusable
            or response.close
            or not self.request_sent
            or self.generation != agent.generation
            or len(idle) >= MAX_IDLE
        ):
            self.transport.close()
        else:
            self.used = True
            self.since = self._context.now
            idle.append(self)
            if self.reading_paused:
                self.resume_reading()
        client.exchanged()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and self.client is not None:
            self.request_sent = False  # the connection cannot be used again
            for data in unread(self.transport):
                if self.client is not None:
                    self.data_received(data)
        client = self.client
        if client is None:
            if self.mode is _IDLE and self in self.agent.idle:
                self.agent.idle.remove(self)
            return
        if self.mode is _REST and exc is None:
            # An answer without a length ends with the connection (RFC 9112, 6.3).
            if client.rechunk:
                client.pass_on(b"0\r\n\r\n")
            self.complete(False)
            return
        self.client = None
        untouched = self.mode is AWAIT and self.partial is None and not self.informational
        client.upstream_lost(untouched=untouched)

    def pause_reading(self) -> None:
        """Read no more of the answer: its client reads too slowly."""
        self.reading_paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self.reading_paused = False
        if not self.pausing:
            self.transport.resume_reading()

    def _end_pause(self) -> None:
        self.pausing = False
        if not self.reading_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.client is not None:
            self.client.regulate_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.client is not None:
            self.client.regulate_reading()


def dense_pause(agent: Agent, size: int, chunks: int, now: float) -> float:
    """Return for how many seconds not to read: an agent's tiny chunks and frames take at most a tenth of the time.

    :param size: bytes of the last read; :param chunks: of a body, or frames of a WebSocket, in them.
    """
    if chunks * DENSE <= size or chunks < DENSE:
        return 0.0
    agent.next_chunks = max(now, agent.next_chunks) + chunks * CHUNK_PAUSE
    return agent.next_chunks - now


_PIECE: Final = 65536
_MAX_PIECES: Final = 16


def unread(transport: asyncio.BaseTransport) -> Iterator[bytes]:
    """Yield what has arrived and was not read: in `connection_lost`, while the socket is still open.

    An app may answer before it has read the whole request, and close.  The next write then fails, and the event
    loop ends the connection without reading what has arrived.  Nothing comes from a TLS connection, whose socket
    holds encrypted bytes.
    """
    sock = None if transport.get_extra_info("sslcontext") else transport.get_extra_info("socket")
    fd = -1 if sock is None else sock.fileno()
    for _ in range(_MAX_PIECES if fd >= 0 else 0):
        try:
            data = os.read(fd, _PIECE)
        except OSError:
            return
        if not data:
            return
        yield data
