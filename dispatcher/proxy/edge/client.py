"""One connection from the web.  Touches its transport; asks the worker for sessions, agents and upstreams.

A connection works on one request at a time: it reads a head, has it routed, passes the body on as it comes, and
passes the answer back; what arrives early waits.  No task, future or timer belongs to a request: the worker's wheel
looks at `deadline` twice a second, and everything else happens in the callbacks of the two transports.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dispatcher.proxy.edge import pages, router
from dispatcher.proxy.edge.chunked import Chunked
from dispatcher.proxy.edge.headers import BadHead
from dispatcher.proxy.edge.pages import Failure
from dispatcher.proxy.edge.request import CHUNKED, IDEMPOTENT, Request, parse_request, upstream_lines
from dispatcher.proxy.edge.response import Response, client_head
from dispatcher.proxy.edge.settings import CONNECT_TIMEOUT, FRESH_UPSTREAM, LINGER, LINGER_BYTES, WRITE_HIGH
from dispatcher.proxy.edge.tunnel import tunnel
from dispatcher.proxy.edge.upstream import AWAIT, Upstream

if TYPE_CHECKING:
    from dispatcher.proxy.edge.tables import Agent, Session
    from dispatcher.proxy.edge.worker import Worker

# What the connection is doing.
HEAD = 0  # between requests, or in the middle of a head
BODY = 1  # a request was passed on and its body still comes
ANSWER = 2  # the request is complete, the answer is not
WAIT = 3  # the request cannot be passed on yet: lookup, held, connecting
STREAM = 4  # an event stream of the edge's own
LINGER_STATE = 5  # the last word was said
CLOSED = 6

FOREVER = float("inf")


class Client(asyncio.Protocol):
    """A client's connection.

    :ivar address: of the peer, or what a trusted PROXY header says; :ivar deadline: when `expired` is called.
    :ivar rechunk: the answer's body goes out in chunks; :ivar write_paused: the client reads too slowly.
    """

    __slots__ = (
        "_block",
        "_lines",
        "_lines_agent",
        "_model",
        "address",
        "agent",
        "body",
        "bytes_in",
        "bytes_out",
        "closing",
        "cookie",
        "deadline",
        "decoder",
        "digest",
        "eof",
        "held_until",
        "holding",
        "left",
        "parked",
        "parked_for",
        "partial",
        "poll",
        "proto",
        "rechunk",
        "remote",
        "replay",
        "request",
        "request_id",
        "rest_cookie",
        "session",
        "spoke",
        "started",
        "state",
        "status",
        "transport",
        "trusted",
        "upstream",
        "worker",
        "write_paused",
    )

    transport: asyncio.Transport
    request: Any  # a Request, None before the first
    agent: Agent | None

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.address: str | None = None
        self.deadline = FOREVER
        self.partial: bytearray | None = None
        self.body = b""
        self.upstream: Upstream | None = None
        self.session: Session | None = None
        self.agent = None
        self.holding: Agent | None = None
        self.decoder: Chunked | None = None
        self.replay: bytes | None = None
        self.left = 0
        self.held_until = 0.0
        self.parked = b""
        self.parked_for = 0
        self.cookie = self.digest = self.rest_cookie = b""
        self.remote = b""
        # The last request's field lines, what they mean, and what became of them for an upstream: clients repeat
        # them on a connection, and then only the request line is read again.
        self._block = b""
        self._model: Request | None = None
        self._lines = b""
        self._lines_agent: Agent | None = None
        self.bytes_in = self.bytes_out = self.spoke = 0
        self.started = 0.0
        self.reset()

    def reset(self) -> None:
        """Be as new, for the next connection; what was learned of a client's field lines may come in useful."""
        self.state = HEAD
        self.write_paused = self.closing = self.eof = self.poll = self.rechunk = self.trusted = False
        self.proto = self.worker.settings.scheme
        self.status = 0
        self.request_id = b""
        self.request = None

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
            if self.partial is None:
                self._heads(data)
            else:
                self._more_head(data)
        elif state == BODY:
            self._body(data)
        elif state < STREAM:
            self._early(data)
        elif state == LINGER_STATE:
            self.spoke += len(data)
            if self.spoke > LINGER_BYTES:
                self.transport.abort()

    def eof_received(self) -> bool:
        """The client will send no more; what it asked for is still answered (RFC 9112, 9.6)."""
        self.eof = True
        if self.state in {ANSWER, WAIT, STREAM}:
            self.closing = True
            if self.deadline == FOREVER or self.deadline > self.worker.now + self.worker.settings.body_timeout:
                self.deadline = self.worker.now + self.worker.settings.body_timeout
            return self.transport.can_write_eof()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.state, state = CLOSED, self.state
        upstream = self.upstream
        if upstream is not None:
            self.upstream = None
            upstream.leave()
        if self.holding is not None or self.parked:
            self.release()
        if self.agent is not None:
            self._settle(self.agent, self.status or 499)
        self.decoder = self.replay = self.partial = None
        self.body = b""
        self.worker.forget(self, streaming=state == STREAM)

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.upstream is not None:
            self.upstream.transport.pause_reading()
        self.worker.watch_writer(self)

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.upstream is not None:
            self.upstream.transport.resume_reading()
        if self.state == HEAD:
            self.deadline = self.worker.now + self.worker.settings.idle_timeout
            self._next()
        elif self.state == BODY:
            self.deadline = self.worker.now + self.worker.settings.body_timeout
        elif self.state == ANSWER:
            self.deadline = FOREVER
        elif self.state == STREAM:
            self.worker.events.resume(self)

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
            cut = head.find(b"\r\n")
            block = head[cut:]
            if block == self._block:
                request = self._model
                assert request is not None
                request.start(head[:cut])
                request.size = end
            else:
                request = None
            if request is None or not request.version:
                self._lines_agent = None
                request = parse_request(head, settings.head_fields)
                if request.repeats():
                    self._block = block
                    self._model = request
                else:
                    self._block = b""
        except BadHead as error:
            if data[:2] == b"\r\n" and not skipped:
                # RFC 9112, 2.2: an empty line before the request line is ignored.
                self._heads(data[2:], skipped=True)
                return
            self._refuse(error)
            return
        self.request = request
        self.closing = request.close or self.eof or worker.draining
        self.bytes_in = end
        self.bytes_out = 0
        self.held_until = 0.0
        self.request_id = worker.request_id()
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
            self._refuse(BadHead("no request line"))
            return
        if len(data) > self.worker.settings.head_bytes:
            self._refuse(BadHead(f"a head of more than {self.worker.settings.head_bytes} bytes", 431))
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
            self._refuse(BadHead(f"a head of more than {self.worker.settings.head_bytes} bytes", 431))

    def _early(self, data: bytes) -> None:
        """Keep what came while a request is being answered: a pipelined request, or a body that must wait."""
        if self.state == WAIT or self.request.upgrade:
            self.body += data
        elif self.partial is None:
            self.partial = bytearray(data)
        else:
            self.partial += data
        if len(self.body) + len(self.partial or b"") > WRITE_HIGH:
            self.transport.pause_reading()

    def _next(self) -> None:
        """Go on with what is already here."""
        self.transport.resume_reading()
        partial = self.partial
        if partial is not None and self.state == HEAD:
            self.partial = None
            self._heads(bytes(partial))

    # Passing a request on.

    def dispatch(self, agent: Agent) -> None:
        """Send the request to an agent that runs, or to the portal."""
        if agent.in_flight >= self.worker.settings.in_flight:
            self.say(pages.TOO_BUSY)
            return
        if self.agent is None:
            agent.in_flight += 1
            self.agent = agent
        request = self.request
        idle = agent.idle
        if idle:
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
        if request is not self._model or agent is not self._lines_agent or self.trusted:
            self._lines = upstream_lines(request, router.cookie_for(self, agent), worker.fixed_lines(self, agent))
            self._lines_agent = agent if request is self._model else None
        head = b"".join((request.method, b" ", request.target, self._lines, self.request_id, b"\r\n\r\n"))
        self.deadline = worker.now + worker.settings.upstream_timeout
        self.replay = None
        length = request.length
        if not length:
            self.state = ANSWER
            if self.body and not request.upgrade:
                self.partial = bytearray(self.body)
                self.body = b""
            if (upstream.used and request.traits & IDEMPOTENT) or request.navigation():
                # For people on a new connection too: an agent that was just killed may have taken it, and the
                # second try finds nobody, which is what the waiting page is for.
                self.replay = head
        else:
            try:
                first = self._first_of_body(length)
            except BadHead as error:
                self.upstream = None
                agent.idle.append(upstream)  # it has seen nothing of this
                self._refuse(error)
                return
            head += first
            if self.state == ANSWER and upstream.used and request.traits & IDEMPOTENT:
                self.replay = head
        agent.traffic.bytes_in += len(head)
        upstream.client = self
        upstream.mode = AWAIT
        upstream.transport.write(head)

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
        upstream.client = self
        upstream.mode = AWAIT
        upstream.transport.write(replay)

    def _first_of_body(self, length: int) -> bytes:
        body, self.body = self.body, b""
        self.state = BODY
        self.transport.resume_reading()  # it may have waited for the agent
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
        self.left = 0
        self.state = ANSWER
        self.deadline = self.worker.now + self.worker.settings.upstream_timeout
        if self.status:
            self.deadline = FOREVER
        if rest:
            self.partial = bytearray(rest)

    def _body(self, data: bytes) -> None:
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
            self._refuse(error)
            return
        if passed:
            upstream.transport.write(passed)

    def resume_body(self) -> None:
        """The upstream takes more of the body again."""
        self.transport.resume_reading()
        if self.state == BODY:
            self.deadline = self.worker.now + self.worker.settings.body_timeout

    @property
    def request_sent(self) -> bool:
        """Whether the whole request has gone to the upstream."""
        return self.state == ANSWER

    # Passing the answer back.

    def answer_head(self, response: Response) -> bytes:
        """Return the head of an answer as this client gets it, and settle how the exchange ends."""
        worker = self.worker
        self.status = response.status
        self.replay = None
        if self.state == BODY or worker.draining:
            # The body may never be read to its end: no further request can follow it.
            self.closing = True
        elif response.length >= 0 and response.dated and not self.closing and self.request.version:
            self.rechunk = False
            if not worker.settings.hsts_line:
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
            counters = agent.counters
            if counters is not None and not worker.log.on:
                counters[self.status // 100] += 1
            else:
                worker.count(self, agent, self.status)
        self.status = 0
        if self.closing:
            self._finish(clean=self.state == ANSWER)
            return
        self.state = HEAD
        if self.body:
            self.partial, self.body = bytearray(self.body), b""
        if self.write_paused:
            return  # the next request waits until this answer has left
        self.deadline = worker.now + worker.settings.idle_timeout
        if self.partial is not None:
            self._next()

    def _settle(self, agent: Agent, status: int) -> None:
        """Leave the agent that works on the request, and count the exchange unless it goes on elsewhere (0)."""
        self.agent = None
        agent.in_flight -= 1
        self.status = 0
        if status:
            self.worker.count(self, agent, status)

    def upgraded(self, upstream: Upstream, response: Response, rest: bytes) -> None:
        """The upstream took the upgrade: from here on the connection is a tunnel."""
        agent, session = self.agent, self.session
        assert agent is not None
        early, self.body = self.body, b""
        head = client_head(response, b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        self.upstream = None
        self._settle(agent, 101)
        self.state = CLOSED
        self.worker.hand_over(self)
        tunnel(self.worker, self, upstream, agent, session, head + rest, early)

    # What goes wrong.

    def upstream_lost(self, *, untouched: bool) -> None:
        """The upstream's connection ended before the answer did."""
        agent = self.agent
        self.upstream = None
        if agent is None:
            return
        if untouched and self.replay is not None and not agent.gone:
            # A kept-alive connection ended just as the request was sent (RFC 9110, 9.2.2): once more, on a new one.
            self._connect(agent)
            return
        self._fail(pages.GONE_AWAY)

    def upstream_invalid(self, why: str) -> None:
        """The upstream broke the protocol."""
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.leave()
        if self.agent is not None:
            self.worker.log_invalid(self.agent, self.request_id, why)
        self._fail(pages.BAD_ANSWER)

    def _fail(self, failure: Failure) -> None:
        """Say that there is no answer; when a part of one has been passed on, break off so that it shows."""
        if self.status:
            self.transport.abort()
        else:
            self.say(failure)

    def expired(self) -> None:
        """The deadline has passed."""
        worker = self.worker
        if self.write_paused and worker.still_writing(self):
            return
        state = self.state
        if state == STREAM:
            worker.events.ping(self)
        elif state == WAIT:
            self.deadline = FOREVER
            router.waited(self)
        elif state == BODY and not self.status:
            self._drop_upstream()
            self.closing = True
            self.say(pages.SLOW_REQUEST)
        elif state == ANSWER and not self.status and not self.eof:
            self._drop_upstream()
            self.say(pages.TOO_SLOW)
        elif state == HEAD and self.partial is not None:
            self._refuse(BadHead("a head that did not arrive in time", 408))
        elif state == HEAD and not self.write_paused:
            self.state = LINGER_STATE
            self.deadline = worker.now + LINGER
            self.transport.close()
        else:
            self.deadline = FOREVER
            self.transport.abort()

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.leave()

    # The edge's own answers.

    def _refuse(self, error: BadHead) -> None:
        """Answer a request that cannot be understood; nothing after it can be either."""
        self.partial = None
        self.body = b""
        self.closing = True
        self.worker.refused += 1
        if self.state == HEAD:
            self.request = None  # there is none
        if self.status:
            self.transport.abort()
            return
        if not self.request_id:
            self.request_id = self.worker.request_id()
        failure = pages.bad_request(error.status, error.why)
        self._own(
            pages.failure(
                failure, self.worker.date_line, self.request_id.decode(), page=False, close=True, body=True
            ),
            error.status,
            clean=False,
        )

    def say(self, failure: Failure, link: str = "") -> None:
        """Answer with a failure instead of an agent's answer."""
        request = self.request
        if request is None or self.worker.draining:
            self.closing = True
        clean = self._settle_body()
        answer = pages.failure(
            failure,
            self.worker.date_line + self.worker.settings.hsts_line,
            self.request_id.decode(),
            page=request is not None and request.wants_html(),
            close=self.closing,
            body=request is None or request.method != b"HEAD",
            link=link,
        )
        self._own(answer, failure.status, clean=clean)

    def redirect(self, location: bytes) -> None:
        """Send the browser elsewhere."""
        clean = self._settle_body()
        date = self.worker.date_line + self.worker.settings.hsts_line
        self._own(pages.redirect(location, date, close=self.closing), 303, clean=clean)

    def _settle_body(self) -> bool:
        """Without reading the body: what is not here yet ends the connection.  Return whether it was all here."""
        request = self.request
        if request is None:
            return False
        body, self.body = self.body, b""
        if request.length and self.state != ANSWER and self.replay is None:
            if request.length < 0 or len(body) < request.length or self.state == BODY:
                self.closing = True
                return False
            body = body[request.length :]
        if request.upgrade:
            self.closing = True
        if body:
            self.partial = bytearray(body)
        return True

    def _own(self, answer: bytes, status: int, *, clean: bool) -> None:
        self.release()
        if self.agent is not None:
            self._settle(self.agent, status)
        elif self.request_id:
            self.worker.count(self, None, status)
        self.transport.write(answer)
        if self.closing:
            self._finish(clean=clean)
        else:
            self.state = HEAD
            self.deadline = self.worker.now + self.worker.settings.idle_timeout
            if self.partial is not None and not self.write_paused:
                self.worker.soon(self._next)

    def _finish(self, *, clean: bool) -> None:
        """Close after the last answer; listen on for a moment when more input may be under way (RFC 9112, 9.6)."""
        self.partial = None
        self.state = LINGER_STATE
        self.deadline = self.worker.now + self.worker.settings.body_timeout
        if clean or self.eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.deadline = self.worker.now + LINGER
        self.spoke = 0
        self.transport.resume_reading()
        self.transport.write_eof()

    def moved(self, remote: bytes) -> None:
        """The client has another address than the one before."""
        self.remote = remote
        self._lines_agent = None

    # Waiting.

    def park(self, deadline: float) -> None:
        """Wait for something that is not the client's to bring."""
        self.state = WAIT
        self.deadline = deadline

    def hold(self, agent: Agent, seconds: float) -> None:
        """Keep the request until the agent's row changes, for `seconds` from now, or the rest of an earlier wait."""
        if self.agent is not None:
            self._settle(self.agent, 0)
        self.held_until = self.held_until or self.worker.now + seconds
        self.holding = agent
        agent.waiting[self] = None
        self.park(self.held_until)

    def release(self) -> None:
        """Leave the agent that the request was held for."""
        self.parked = b""
        agent, self.holding = self.holding, None
        if agent is not None:
            agent.waiting.pop(self, None)

    def outward(self) -> tuple[bytes, bytes]:
        """Return scheme and host as the browser knows them."""
        return self.proto, self.request.host

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self.state == HEAD and self.partial is None and not self.write_paused:
            self._finish(clean=True)

    def revoke(self) -> None:
        """The session has ended: whatever is under way for it ends too, but not the sign-out itself."""
        with_portal = self.agent is not None and not self.agent.name
        if self.state in {BODY, ANSWER, WAIT, STREAM} and not with_portal:
            self.transport.abort()
        self.session = None
