"""Passing a request on to an upstream, and its answer back.  Touches both transports of an exchange.

The head and the first bytes of a body are one write, later bytes are passed on as they come, and whoever is
slower holds the other back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.headers import BadHead
from dispatcher.proxy.edge.http.request import CHUNKED, IDEMPOTENT, SAFE, upstream_lines
from dispatcher.proxy.edge.http.response import Response, client_head
from dispatcher.proxy.edge.net.connection import ANSWER, BODY, CLOSED, FOREVER, HEAD, WAIT, Connection
from dispatcher.proxy.edge.net.tunnel import tunnel
from dispatcher.proxy.edge.net.upstream import AWAIT, Upstream
from dispatcher.proxy.edge.routing import pages, router
from dispatcher.proxy.edge.routing.settings import CONNECT_TIMEOUT, FRESH_UPSTREAM

if TYPE_CHECKING:
    from dispatcher.proxy.edge.routing.table import Agent


class Exchange(Connection):
    """A connection while a request and its answer pass through it."""

    __slots__ = ()

    # The request.

    def dispatch(self, agent: Agent) -> None:
        """Send the request to an agent that runs, or to the portal."""
        if agent.in_flight >= self.worker.settings.in_flight:
            self.say(pages.TOO_BUSY)
            return
        if self.agent is None:
            if not agent.name and not self.worker.enter_portal(self.remote):
                self.say(pages.TOO_BUSY)
                return
            agent.in_flight += 1
            self.agent = agent
        request = self.request
        idle = agent.idle
        if idle and self.replay is None:
            upstream = idle.pop()
            if request.traits & IDEMPOTENT or self.worker.now - upstream.since < FRESH_UPSTREAM:
                self.send(upstream)
                return
            idle.append(upstream)
        self._connect(agent)

    def _connect(self, agent: Agent) -> None:
        self.state = WAIT
        self.deadline = self.worker.now + CONNECT_TIMEOUT + 1
        self.worker.connect(agent, self)

    def send(self, upstream: Upstream) -> None:
        """Send the request over a connection: the head, and in the same write what is there of the body."""
        request = self.request
        worker = self.worker
        agent = upstream.agent
        self.upstream = upstream
        if request is not self.model or agent is not self.outgoing_agent or self.trusted:
            self.outgoing = upstream_lines(
                request, router.cookie_for(self, agent), worker.fixed_lines(self, agent)
            )
            self.outgoing_agent = agent if request is self.model else None
        head = b"".join((request.method, b" ", request.target, self.outgoing, self.request_id, b"\r\n\r\n"))
        self.deadline = worker.now + worker.settings.upstream_timeout
        self.replay = None
        length = request.length
        if not length:
            self.state = ANSWER
            if self.body and not request.upgrade:
                self.partial = bytearray(self.body)
                self.body = b""
            if request.traits & (IDEMPOTENT if upstream.used else SAFE):
                # On a new connection too: an agent that was just killed may have taken it.  The second try finds
                # nobody, and is held until the agent is back.
                self.replay = head
        else:
            try:
                first = self._first_of_body(length)
            except BadHead as error:
                self.upstream = None
                agent.idle.append(upstream)  # it has seen nothing of this
                self.refuse(error)
                return
            head += first
            if self.state == ANSWER and upstream.used and request.traits & IDEMPOTENT:
                self.replay = head
        agent.traffic.bytes_in += len(head)
        self._start(upstream, head)

    def _start(self, upstream: Upstream, head: bytes) -> None:
        """Begin an exchange: each side is read only while the other takes what comes."""
        upstream.client = self
        upstream.mode = AWAIT
        if self.write_paused:
            upstream.transport.pause_reading()
        upstream.transport.write(head)
        if self.reading_paused:
            self.regulate_reading()
        elif self.state == BODY:
            self.transport.resume_reading()  # a new connection that the loop does not read yet

    def connected(self, upstream: Upstream) -> None:
        """A new connection is there: use it."""
        replay = self.replay
        if replay is None:
            self.send(upstream)
            return
        self.replay = None
        self.upstream = upstream
        self.state = ANSWER
        self.deadline = self.worker.now + self.worker.settings.upstream_timeout
        if self.body and not self.request.upgrade:
            self.partial = (self.partial or bytearray()) + self.body
            self.body = b""
        self._start(upstream, replay)

    def _first_of_body(self, length: int) -> bytes:
        body, self.body = self.body, b""
        self.state = BODY
        self.deadline = self.worker.now + self.worker.settings.body_timeout
        if length == CHUNKED:
            self.decoder = Chunked()
            self.left = CHUNKED
            return self._decode(body) if body else b""
        self.left = length
        if len(body) < length:
            self.left -= len(body)
            return body
        self._body_done(body[length:])
        return body[:length]

    def _decode(self, data: bytes) -> bytes:
        assert self.decoder is not None
        passed = self.decoder.feed(data)
        if self.decoder.done:
            rest = self.decoder.rest
            self.decoder = None
            self._body_done(rest)
        return passed

    def _body_done(self, rest: bytes) -> None:
        worker = self.worker
        self.left = 0
        self.state = ANSWER
        self.deadline = worker.now + worker.settings.upstream_timeout
        if self.write_paused:
            worker.watch_writer(self)
        elif self.status:
            self.deadline = FOREVER
        if rest:
            self.partial = bytearray(rest)

    def body_piece(self, data: bytes) -> None:
        """Pass a piece of the body on."""
        worker = self.worker
        upstream = self.upstream
        agent = self.agent
        if upstream is None or agent is None:
            return
        size = len(data)
        self.bytes_in += size
        agent.traffic.bytes_in += size
        agent.traffic.bulk += size
        if self.left > 0:
            if size < self.left:
                self.left -= size
                self.deadline = worker.now + worker.settings.body_timeout
                upstream.transport.write(data)
                return
            left = self.left
            self._body_done(data[left:])
            upstream.transport.write(data[:left])
            return
        self.deadline = worker.now + worker.settings.body_timeout
        try:
            passed = self._decode(data)
        except BadHead as error:
            upstream.leave()
            self.upstream = None
            self.refuse(error)
            return
        if passed:
            upstream.transport.write(passed)

    def resume_body(self) -> None:
        """The upstream takes more of the body again."""
        self.regulate_reading()
        if self.state == BODY:
            self.deadline = self.worker.now + self.worker.settings.body_timeout

    # The answer.

    def answer_head(self, response: Response) -> bytes:
        """Return the head of an answer as this client gets it, and settle how the exchange ends."""
        worker = self.worker
        self.status = response.status
        self.replay = None
        if self.state == BODY or worker.draining:
            # The body may never be read to its end: no further request can follow it.
            self.closing = True
        if response.length >= 0 and response.dated and self.request.version and not worker.settings.hsts_line:
            self.rechunk = False
            if self.closing:
                if self.state == ANSWER and not self.eof:
                    head = response.last
                    if not head:
                        head = response.last = client_head(response, b"Connection: close\r\n")
                    self.deadline = FOREVER
                    return head
            else:
                head = response.plain
                if not head:
                    head = response.plain = client_head(response, b"")
                if response.length:
                    self.deadline = FOREVER
                return head
        return self._altered_head(response)

    def _altered_head(self, response: Response) -> bytes:
        """Return a head to which the edge adds something."""
        request = self.request
        worker = self.worker
        additions = worker.settings.hsts_line
        if not response.dated:
            additions += worker.date_line
        self.rechunk = False
        if response.length < 0:
            if request.version:
                self.rechunk = True
                additions += b"Transfer-Encoding: chunked\r\n"
            else:
                self.closing = True
        if self.closing:
            additions += b"Connection: close\r\n"
        elif not request.version:
            additions += b"Connection: keep-alive\r\n"
        if self.state == ANSWER:
            self.deadline = FOREVER if not self.eof else worker.now + worker.settings.body_timeout
        return client_head(response, additions)

    def deliver(self, data: bytes, size: int) -> None:
        """Write an answer's head, joined with `size` bytes of its body."""
        agent = self.agent
        if agent is not None:
            traffic = agent.traffic
            traffic.bytes_out += len(data)
            if not self.poll:
                traffic.bulk += size
        self.bytes_out += len(data)
        if self.write_paused:
            self.worker.watch_writer(self)
        self.transport.write(data)

    def pass_on(self, data: bytes) -> None:
        """Write a later piece of an answer's body."""
        agent = self.agent
        size = len(data)
        if agent is not None:
            traffic = agent.traffic
            traffic.bytes_out += size
            if not self.poll or self.worker.now - self.started > 5:
                traffic.bulk += size
        self.bytes_out += size
        if self.eof:
            self.deadline = self.worker.now + self.worker.settings.body_timeout
        self.transport.write(data)

    def write(self, data: bytes) -> None:
        """Write something beside the answer."""
        self.transport.write(data)

    def exchanged(self) -> None:
        """The answer is complete: end the connection, or be ready for the next request."""
        worker = self.worker
        agent = self.agent
        self.upstream = self.agent = None
        if agent is not None:
            agent.in_flight -= 1
            if not agent.name:
                worker.leave_portal(self.remote)
            counters = agent.counters
            if counters is not None and not worker.log.on:
                counters[self.status // 100] += 1
            else:
                worker.count(self, agent, self.status)
        self.status = 0
        if self.closing:
            self.finish(clean=self.state == ANSWER)
            return
        self.state = HEAD
        if self.body:
            self.partial, self.body = bytearray(self.body), b""
        if self.write_paused:
            worker.watch_writer(self)  # the next request waits until this answer has left
        else:
            self.deadline = worker.now + worker.settings.idle_timeout
            if self.partial is not None:
                self.proceed()
        if self.reading_paused:
            self.regulate_reading()

    def upgraded(self, upstream: Upstream, response: Response, rest: bytes) -> None:
        """The upstream took the upgrade: from here on the connection is a tunnel."""
        agent, session = self.agent, self.session
        assert agent is not None
        early, self.body = self.body, b""
        head = client_head(response, b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        self.upstream = None
        self.settle(agent, 101)
        self.state = CLOSED
        self.worker.hand_over(self)
        tunnel(self.worker, self, upstream, agent, session, head + rest, early)

    def upstream_lost(self, *, untouched: bool) -> None:
        """The upstream's connection ended before the answer did."""
        agent = self.agent
        self.upstream = None
        if agent is None:
            return
        if untouched and self.replay is not None and not agent.gone:
            # A kept-alive connection ended just as the request was sent (RFC 9110, 9.2.2): once more, on another.
            self._connect(agent)
            return
        if untouched and self.request.traits & SAFE and self.state == ANSWER and router.is_dying(self, agent):
            return
        self.fail(pages.GONE_AWAY)

    def upstream_invalid(self, why: str) -> None:
        """The upstream broke the protocol."""
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.leave()
        if self.agent is not None:
            self.worker.log_invalid(self.agent, self.request_id, why)
        self.fail(pages.BAD_ANSWER)
