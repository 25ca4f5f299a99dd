"""A connection from the web: reading requests, and what its transport says.  Touches its transport.

A connection works on one request at a time: it reads a head, has it routed, passes the body on as it comes, and
passes the answer back; what arrives early waits.  No task, future or timer belongs to a request: the worker's
wheel looks at `deadline` twice a second, and everything else happens in the callbacks of the two transports.
"""

from __future__ import annotations

import asyncio
from functools import partial

from dispatcher.proxy.edge.http.headers import BadHead
from dispatcher.proxy.edge.http.request import Request, parse_request
from dispatcher.proxy.edge.net import body_buffer
from dispatcher.proxy.edge.net.connection import (
    ANSWER,
    BODY,
    CLOSED,
    COLLECT,
    FOREVER,
    HEAD,
    LINGER_STATE,
    STREAM,
    WAIT,
)
from dispatcher.proxy.edge.net.exchange import Exchange
from dispatcher.proxy.edge.net.registry import was_reset
from dispatcher.proxy.edge.routing import pages, router
from dispatcher.proxy.edge.routing.settings import LINGER, LINGER_BYTES, PROBE_PAUSE


class Client(Exchange):
    """A client's connection, complete."""

    __slots__ = ()

    # The transport's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.deadline = self.worker.now + self.worker.settings.head_timeout
        if not self.worker.admit(self):
            self.closing = True
            self.say(pages.FULL)

    def data_received(self, data: bytes) -> None:
        state = self.state
        if state == HEAD:
            if self.write_paused:
                self._early(data)
                return
            if self.partial is not None:
                self._more_head(data)
                return
            block = self.block
            if block and data.endswith(block) and len(data) <= self.worker.settings.head_bytes:
                self._again(data, data[: -len(block)])
            else:
                self._heads(data)
        elif state == BODY:
            self.body_piece(data)
        elif state < STREAM:
            self._early(data)
        elif state == LINGER_STATE:
            self.spoke += len(data)
            if self.spoke > LINGER_BYTES:
                self.transport.abort()
        elif state == COLLECT:
            body_buffer.more(self, data)

    def eof_received(self) -> bool:
        """The client will send no more; what it asked for is still answered (RFC 9112, 9.6)."""
        self.eof = True
        state = self.state
        if state in {ANSWER, WAIT, STREAM}:
            self.closing = True
            if self.deadline == FOREVER or self.deadline > self.worker.now + self.worker.settings.body_timeout:
                self.deadline = self.worker.now + self.worker.settings.body_timeout
            if state != STREAM and self.request.version:
                self.worker.later(PROBE_PAUSE, partial(self._probe, self.transport))
            return self.transport.can_write_eof()
        return False

    def _probe(self, transport: asyncio.Transport, *, asked: bool = False) -> None:
        """Find out whether a client that sends no more still listens, by saying something that means nothing.

        From here, closing a connection for good and closing one direction of it look alike.  The system of a
        client that is gone answers any byte with a reset; one that waits must take a 100 that it did not ask for,
        and ignore it (RFC 9110, 15.2).
        """
        if self.transport is not transport or transport.is_closing() or self.status:
            return
        if self.state not in {ANSWER, WAIT}:
            return
        if not asked:
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.worker.later(PROBE_PAUSE, partial(self._probe, transport, asked=True))
        elif was_reset(transport):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.state, state = CLOSED, self.state
        upstream = self.upstream
        if upstream is not None:
            self.upstream = None
            upstream.leave()
        if self.holding is not None or self.parked:
            self.release()
        if state == COLLECT:
            body_buffer.leave(self)
        if self.agent is not None:
            self.settle(self.agent, self.status or 499)
        self.decoder = self.replay = self.partial = None
        self.body = b""
        if state == STREAM:
            self.worker.events.forget(self)
        self.worker.forget(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.upstream is not None:
            self.upstream.transport.pause_reading()
        if self.state != WAIT:
            self.worker.watch_writer(self)

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.upstream is not None:
            self.upstream.transport.resume_reading()
        if self.state == HEAD:
            self.deadline = self.worker.now + self.worker.settings.idle_timeout
            self.proceed()
        elif self.state == BODY:
            self.deadline = self.worker.now + self.worker.settings.body_timeout
        elif self.state == ANSWER:
            self.deadline = FOREVER
            if not self.status:
                self.deadline = self.worker.now + self.worker.settings.upstream_timeout
            elif self.eof:
                self.deadline = self.worker.now + self.worker.settings.body_timeout
        elif self.state == STREAM:
            self.worker.events.resume(self)

    def expired(self) -> None:
        """The deadline has passed."""
        worker = self.worker
        state = self.state
        if self.write_paused and state != WAIT:
            if not worker.still_writing(self):
                self.transport.abort()
            return
        if state == STREAM:
            worker.events.ping(self)
        elif state == WAIT:
            self.deadline = FOREVER
            router.waited(self)
        elif state == COLLECT:
            body_buffer.expired(self)
        elif state == BODY and not self.status:
            self.drop_upstream()
            self.closing = True
            self.say(pages.SLOW_REQUEST)
        elif state == ANSWER and not self.status and not self.eof:
            self.drop_upstream()
            self.say(pages.TOO_SLOW)
        elif state == HEAD and self.partial is not None:
            self.refuse(BadHead("a head that did not arrive in time", 408))
        elif state == HEAD:
            self.state = LINGER_STATE
            self.deadline = worker.now + LINGER
            self.transport.close()
        else:
            self.deadline = FOREVER
            self.transport.abort()

    # Reading a request.

    def _heads(self, data: bytes, *, skipped: bool = False) -> None:
        end = data.find(b"\r\n\r\n")
        if end <= 0:
            self._begin_head(data)
            return
        end += 4
        worker = self.worker
        settings = worker.settings
        try:
            if end > settings.head_bytes:
                raise BadHead(f"a head of more than {settings.head_bytes} bytes", 431)
            if end == len(data):
                head = data
                self.body = b""
            else:
                head = data[:end]
                self.body = data[end:]
            request = parse_request(head, settings.head_fields)
        except BadHead as error:
            if data[:2] == b"\r\n" and not skipped:
                # RFC 9112, 2.2: an empty line before the request line is ignored.
                self._heads(data[2:], skipped=True)
                return
            self.refuse(error)
            return
        self.outgoing_agent = None
        if request.repeats():
            self.block = head[head.find(b"\r\n") :]
            self.model = request
        else:
            self.block = b""
        self._begin(request, end)

    def _again(self, data: bytes, line: bytes) -> None:
        """Take a head whose field lines are those of the request before: only the request line is read."""
        request = self.model
        assert request is not None
        try:
            request.start(line)
        except BadHead:
            request.version = 0
        if request.version:
            self.body = b""
            self._begin(request, len(data))
        else:
            self.block = b""  # bad, or HTTP/1.0, in which the same lines mean something else
            self._heads(data)

    def _begin(self, request: Request, size: int) -> None:
        worker = self.worker
        self.request = request
        self.closing = request.close or self.eof or worker.draining
        self.bytes_in = size
        self.bytes_out = 0
        self.held_until = 0.0
        self.replay = None
        worker.serial = serial = worker.serial + 1
        self.request_id = b"%b%08x" % (worker.request_prefix, serial)
        self.started = worker.clock() if worker.log.on else worker.now
        if self.trusted:
            worker.believe(self, request)
        router.route(self, request)

    def _begin_head(self, data: bytes) -> None:
        """Keep the beginning of a head."""
        if data[:2] == b"\r\n":
            data = data[2:]
        if not data or data == b"\r":
            return
        if not 0x41 <= data[0] <= 0x5A:
            self.refuse(BadHead("no request line"))
            return
        if len(data) > self.worker.settings.head_bytes:
            self.refuse(BadHead(f"a head of more than {self.worker.settings.head_bytes} bytes", 431))
            return
        if b"\r\n\r\n" in data:
            self._heads(data, skipped=True)
            return
        self.partial = bytearray(data)
        self.deadline = self.worker.now + self.worker.settings.head_timeout

    def _more_head(self, data: bytes) -> None:
        partial = self.partial
        assert partial is not None
        start = max(0, len(partial) - 3)
        partial += data
        if partial.find(b"\r\n\r\n", start) >= 0:
            self.partial = None
            self._heads(bytes(partial))
        elif len(partial) > self.worker.settings.head_bytes:
            self.refuse(BadHead(f"a head of more than {self.worker.settings.head_bytes} bytes", 431))

    def _early(self, data: bytes) -> None:
        """Keep what came while a request is being answered: a pipelined request, or a body that must wait."""
        if self.state == WAIT or (self.state != HEAD and self.request.upgrade):
            self.body += data
        elif self.partial is None:
            self.partial = bytearray(data)
        else:
            self.partial += data
        self.regulate_reading()

    def proceed(self) -> None:
        partial = self.partial
        if partial is not None and self.state == HEAD and not self.write_paused:
            self.partial = None
            self._heads(bytes(partial))
        if self.reading_paused:
            self.regulate_reading()
