"""A client's connection: it reads requests, carries the router's decisions out and writes the answers.

It works on one request at a time: it reads a head, has it routed, passes the body on as it comes, and passes the
answer back; bytes that come early wait.  No task, future or timer belongs to a request: the registry's timer wheel
checks `deadline` twice a second, and everything else happens in the callbacks of the two transports.  The head and
the first bytes of a body are one write.  Each side is read only while the other one takes its bytes.
"""

from __future__ import annotations

import asyncio
from enum import Enum

from dispatcher.proxy.edge.http import headers
from dispatcher.proxy.edge.http.forwarded import usable_request_id
from dispatcher.proxy.edge.http.head_reader import HeadReader
from dispatcher.proxy.edge.http.headers import BadHead
from dispatcher.proxy.edge.http.request import IDEMPOTENT, SAFE, Request, upstream_lines
from dispatcher.proxy.edge.http.response import Response, client_head
from dispatcher.proxy.edge.net.body_buffer import BodyBuffer
from dispatcher.proxy.edge.net.exchange import Exchange
from dispatcher.proxy.edge.net.services import Services
from dispatcher.proxy.edge.net.tunnel import ClientEnd, UpstreamEnd, tunnel
from dispatcher.proxy.edge.net.upstream import Upstream
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.decision import (
    PORTAL,
    Decision,
    Events,
    Hold,
    Lookup,
    Page,
    Pass,
    Portal,
    Redirect,
    Refuse,
    Wake,
)
from dispatcher.proxy.edge.routing.pages import Failure
from dispatcher.proxy.edge.routing.session_cookie import SessionCookie
from dispatcher.proxy.edge.routing.settings import (
    CONNECT_TIMEOUT,
    FRESH_UPSTREAM,
    LINGER,
    LINGER_BYTES,
    LOOKUP_TIMEOUT,
    WRITE_HIGH,
)
from dispatcher.proxy.edge.routing.table import Agent, Session

FOREVER = float("inf")


class State(Enum):
    """What the connection is doing."""

    HEAD = "between requests, or in the middle of a head"
    BODY = "a request is being passed on, and its body still comes"
    ANSWER = "the request is complete, the answer is not"
    WAIT = "the request cannot be passed on yet: lookup, hold, connect"
    STREAM = "an event stream"
    LINGER = "the last answer is written"
    CLOSED = "the transport is gone, or serves a tunnel"
    COLLECT = "the body of a request for the portal comes"


_HEAD, _BODY, _ANSWER, _WAIT = State.HEAD, State.BODY, State.ANSWER, State.WAIT


class Connection(asyncio.Protocol):
    """A client's connection; the object serves one client after the other.

    :ivar address: of the peer, or of a trusted PROXY header; :ivar remote: the client's, for agents and logs.
    :ivar deadline: when `expired` is called; :ivar closing: no request follows; :ivar eof: the client sent all.
    :ivar write_paused: the client reads too slowly; :ivar unsent: the bytes it had not taken at the last check.
    :ivar reading_paused: the client is not read, see `regulate_reading`; :ivar trusted: its proxy headers are.
    """

    __slots__ = (
        "_buffer",
        "_cookie",
        "_outgoing",
        "_outgoing_agent",
        "_outgoing_request",
        "address",
        "closing",
        "deadline",
        "eof",
        "exchange",
        "reader",
        "reading_paused",
        "remote",
        "scheme",
        "session",
        "state",
        "transport",
        "trusted",
        "unsent",
        "worker",
        "write_paused",
    )

    transport: asyncio.Transport

    def __init__(self, worker: Services) -> None:
        settings = worker.settings
        self.worker = worker
        self.exchange = Exchange()
        self.reader = HeadReader(settings.head_bytes, settings.head_fields)
        self._cookie = SessionCookie(settings.cookie_name)
        self._buffer: BodyBuffer | None = None
        # The field lines of a request as its upstream gets them: clients repeat their lines.
        self._outgoing = b""
        self._outgoing_request: Request | None = None
        self._outgoing_agent: Agent | None = None
        self.address: str | None = None
        self.deadline = FOREVER
        self.session: Session | None = None
        self.remote = b""
        self.unsent = 0
        self.trusted = False
        self.reset()

    def reset(self) -> None:
        """Forget the client, to serve the next one; the meaning of field lines is kept."""
        if self.trusted:  # they meant more than they will
            self.reader.forget()
            self._outgoing_request = None
        self.state = _HEAD
        self.write_paused = self.reading_paused = self.closing = self.eof = self.trusted = False
        self.scheme = self.worker.settings.scheme
        self.reader.kept = None
        self.exchange.clear()

    def identify(self, remote: bytes, *, trusted: bool) -> None:
        """Take the peer's address, and whether its forwarding headers are trusted."""
        self.trusted = trusted
        if remote != self.remote:
            self.remote = remote
            self._outgoing_request = None

    # The transport's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.deadline = self.worker.now + self.worker.settings.head_timeout
        if not self.worker.admit(self):
            self.closing = True
            self._refuse(pages.FULL)

    def data_received(self, data: bytes) -> None:
        state = self.state
        if state is _HEAD:
            if self.write_paused:
                self._keep(data)
                return
            reader = self.reader
            begun = reader.kept is not None
            try:
                request = reader.read(data)
            except BadHead as error:
                self._refuse_head(error)
                return
            if request is not None:
                self._begin(request)
            elif not begun and reader.kept is not None:
                self.deadline = self.worker.now + self.worker.settings.head_timeout
        elif state is _BODY:
            self._body_received(data)
        elif state is _ANSWER or state is _WAIT:
            self._keep(data)
        elif state is State.COLLECT:
            self._collect(data)
        elif state is State.LINGER:
            self.unsent += len(data)
            if self.unsent > LINGER_BYTES:
                self.transport.abort()

    def eof_received(self) -> bool:
        """The client sends no more; its request is still answered (RFC 9112, 9.6), within `body_timeout`.

        A client that closed its connection looks like one that closed a direction of it.  It is found out by the
        reset that the first bytes of the answer meet, or by this limit.
        """
        self.eof = True
        if self.answering or self.state is State.STREAM:
            self.closing = True
            self.deadline = min(self.deadline, self.worker.now + self.worker.settings.body_timeout)
            return self.transport.can_write_eof()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.state, state = State.CLOSED, self.state
        exchange = self.exchange
        self._abandon_upstream()
        self._release()
        self._release_buffer()
        if exchange.agent is not None:
            self._leave(exchange.agent, exchange.status or 499)
        elif state is State.STREAM:
            self.worker.events.forget(self)
            self._count(None, 200)
        self.worker.forget(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.exchange.upstream is not None:
            self.exchange.upstream.transport.pause_reading()
        if self.state is not _WAIT:
            self.worker.watch_writer(self)

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.exchange.upstream is not None:
            self.exchange.upstream.transport.resume_reading()
        worker = self.worker
        if self.state is _HEAD:
            self.deadline = worker.now + worker.settings.idle_timeout
            self._read_kept()
        elif self.state is _BODY:
            self.deadline = worker.now + worker.settings.body_timeout
        elif self.state is _ANSWER:
            self._await_answer()
        elif self.state is State.STREAM:
            worker.events.resume(self)

    def expired(self) -> None:
        """Act on the deadline, which has passed."""
        worker = self.worker
        state = self.state
        answered = self.exchange.status
        if self.write_paused and state is not _WAIT:
            if not worker.still_writing(self):
                self.transport.abort()
        elif state is State.STREAM:
            worker.events.ping(self)
        elif state is _WAIT:
            self.deadline = FOREVER
            self._waited()
        elif state is State.COLLECT or (state is _BODY and not answered):
            self._release_buffer()
            self._abandon_upstream()
            self.closing = True
            self._refuse(pages.SLOW_REQUEST)
        elif state is _ANSWER and not answered and not self.eof:
            self._abandon_upstream()
            self._refuse(pages.TOO_SLOW)
        elif state is _HEAD and self.reader.kept is not None:
            self._refuse_head(BadHead("a head that did not arrive in time", 408))
        elif state is _HEAD:
            self.state = State.LINGER
            self.deadline = worker.now + LINGER
            self.transport.close()
        else:
            self.deadline = FOREVER
            self.transport.abort()

    # Back-pressure.

    def regulate_reading(self) -> None:
        """Read from the client only what can be passed on, or kept within `WRITE_HIGH`.

        Called whenever one of the reasons not to read may have appeared or gone.
        """
        upstream = self.exchange.upstream
        kept = self.reader.kept
        wait = (
            (upstream is not None and upstream.write_paused)
            or len(self.exchange.body) + len(kept or b"") > WRITE_HIGH
            or (self.write_paused and self.state is _HEAD and kept is not None)
        )
        if wait != self.reading_paused:
            self.reading_paused = wait
            if wait:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def resume_body(self) -> None:
        """The upstream takes more of the body again."""
        self.regulate_reading()
        if self.state is _BODY:
            self.deadline = self.worker.now + self.worker.settings.body_timeout

    def _keep(self, data: bytes) -> None:
        """Keep bytes for later: the next request, or a body that must wait."""
        if self.state is _WAIT or (self.state is _ANSWER and self.exchange.request.upgrade):
            self.exchange.body += data
        else:
            self.reader.keep(data)
        self.regulate_reading()

    def _read_kept(self) -> None:
        """Begin the next request, if it is here and may begin."""
        if self.state is _HEAD and not self.write_paused and self.reader.kept is not None:
            try:
                request = self.reader.read_kept()
            except BadHead as error:
                self._refuse_head(error)
                return
            if request is not None:
                self._begin(request)
            elif self.reader.kept is not None:
                self.deadline = self.worker.now + self.worker.settings.head_timeout
        if self.reading_paused:
            self.regulate_reading()

    # A request.

    def _begin(self, request: Request) -> None:
        worker = self.worker
        exchange = self.exchange
        exchange.request = request
        exchange.body = self.reader.rest
        exchange.bytes_in = self.reader.size
        exchange.bytes_out = 0
        exchange.held_until = 0.0
        exchange.replay = None
        exchange.poll = False
        worker.serial = serial = worker.serial + 1
        exchange.request_id = b"%b%08x" % (worker.request_prefix, serial)
        exchange.started = worker.clock() if worker.log.on else worker.now
        self.closing = request.close or self.eof or worker.draining
        if self.trusted:
            self.remote, self.scheme, host = worker.client_of(self.address or "", request)
            if host:
                request.host = host
            exchange.request_id = usable_request_id(request.fields) or exchange.request_id
        self._route(request)

    def _route(self, request: Request, *, may_look_up: bool = True) -> None:
        """Have the request routed, and carry the decision out."""
        worker = self.worker
        cookie = self._cookie
        session = None
        digest = b""
        field = request.fields.get(headers.COOKIE)
        if field is not None:
            if field != cookie.field:
                cookie.read(field)
            digest = cookie.digest
            session = worker.tables.sessions.get(digest)
            if session is not None and session.expires <= worker.now:
                session = None
        decision = worker.router.route(request, session, worker.now, self.scheme, digest if may_look_up else b"")
        if session is not self.session and session is not None and decision is not PORTAL:
            worker.bind(self, session)
        if decision.__class__ is Pass:  # nearly always
            self.exchange.poll = decision.poll
            self._dispatch(decision.agent)
        else:
            self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        if isinstance(decision, Pass):
            self.exchange.poll = decision.poll
            self._dispatch(decision.agent)
        elif isinstance(decision, Portal):
            self._to_portal()
        elif isinstance(decision, Hold):
            self._hold(decision)
        elif isinstance(decision, Wake):
            self.worker.wake(decision.agent)
            self._carry_out(decision.then)
        elif isinstance(decision, Page):
            self.exchange.request = decision.request
            self._to_portal()
        elif isinstance(decision, Refuse):
            self._refuse(decision.failure, decision.link)
        elif isinstance(decision, Redirect):
            self._redirect(decision.location)
        elif isinstance(decision, Events):
            self._stream(decision.agent)
        else:
            self._look_up(decision)

    def _to_portal(self) -> None:
        exchange = self.exchange
        exchange.poll = True
        request = exchange.request
        if not request.length:
            self._dispatch(self.worker.portal)
            return
        self.state = State.COLLECT
        self.deadline = self.worker.now + self.worker.settings.body_timeout  # for all of it
        self._buffer = BodyBuffer(self.worker, request.length)
        expects, request.expects = request.expects, False  # the edge answers, not the portal
        early, exchange.body = exchange.body, b""
        if early:
            self._collect(early)
        if self.state is State.COLLECT and expects:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110, 10.1.1

    def _collect(self, data: bytes) -> None:
        """Take more of a body for the portal; pass the request on once the body is complete."""
        buffer = self._buffer
        assert buffer is not None
        self.exchange.bytes_in += len(data)
        try:
            failure = buffer.add(data)
        except BadHead as error:
            self._release_buffer()
            self._refuse_head(error)
            return
        if failure is not None:
            self._release_buffer()
            self._refuse(failure)
        elif buffer.complete:
            self._release_buffer()
            self._dispatch(self.worker.portal)

    def _release_buffer(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self.exchange.body = buffer.release()

    def _stream(self, agent: Agent) -> None:
        """Become an event stream."""
        session = self.session
        if session is None or self.worker.events.full(session):
            self._refuse(pages.TOO_BUSY)
            return
        self.state = State.STREAM
        self.closing = True
        self.exchange.body = b""
        self.worker.events.open(self, agent)

    def _dispatch(self, agent: Agent) -> None:
        """Send the request to an agent that runs, or to the portal."""
        worker = self.worker
        exchange = self.exchange
        if agent.in_flight >= worker.settings.in_flight:
            self._refuse(pages.TOO_BUSY)
            return
        if exchange.agent is None:
            if not agent.name and not worker.enter_portal(self.remote):
                self._refuse(pages.TOO_BUSY)
                return
            agent.in_flight += 1
            exchange.agent = agent
        idle = agent.idle
        if idle and exchange.replay is None:
            upstream = idle.pop()
            if exchange.request.traits & IDEMPOTENT or worker.now - upstream.since < FRESH_UPSTREAM:
                self._send(upstream)
                return
            idle.append(upstream)
        self._connect(agent)

    def _connect(self, agent: Agent) -> None:
        self._wait(self.worker.now + CONNECT_TIMEOUT + 1)
        self.worker.connect(agent, self)

    def wants(self, agent: Agent) -> bool:
        """Whether a connection to an agent is still wanted."""
        exchange = self.exchange
        return self.state is _WAIT and exchange.agent is agent and exchange.upstream is None

    def _send(self, upstream: Upstream) -> None:
        """Send the request over a connection: in one write the head and the part of the body that is here."""
        exchange = self.exchange
        request = exchange.request
        worker = self.worker
        agent = upstream.agent
        if request is not self._outgoing_request or agent is not self._outgoing_agent or self.trusted:
            self._outgoing = upstream_lines(
                request,
                self._cookie_for(request, agent),
                worker.fixed_lines(request, agent, self.remote, self.scheme),
            )
            self._outgoing_request = request if request is self.reader.model else None
            self._outgoing_agent = agent
        head = b"".join((request.method, b" ", request.target, self._outgoing, exchange.request_id, b"\r\n\r\n"))
        exchange.replay = None
        if not request.length:
            self._keep_rest()
            if request.traits & (IDEMPOTENT if upstream.used else SAFE):
                # On a new connection too: an agent that was just killed may have taken it.  The second try finds
                # no listener, and is held until the agent is back.
                exchange.replay = head
        else:
            self.state = _BODY
            try:
                head += exchange.begin_body()
            except BadHead as error:
                agent.idle.append(upstream)  # it has seen nothing of this request
                self._refuse_head(error)
                return
            if not exchange.left:
                if exchange.rest:
                    self.reader.keep(exchange.rest)
                if upstream.used and request.traits & IDEMPOTENT:
                    exchange.replay = head
        self._start(upstream, head)

    def _cookie_for(self, request: Request, agent: Agent) -> bytes:
        """Return the Cookie value for an upstream: the portal gets the whole field, an agent the other cookies."""
        field: bytes = request.fields.get(headers.COOKIE, b"")
        if not agent.name or not field:
            return field  # the portal removes the dispatcher's cookies that came twice
        if field != self._cookie.field:
            self._cookie.read(field)
        return self._cookie.others

    def _keep_rest(self) -> None:
        """Keep bytes behind a request without a body for the next one."""
        exchange = self.exchange
        if exchange.body and not exchange.request.upgrade:
            self.reader.keep(exchange.body)
            exchange.body = b""

    def _start(self, upstream: Upstream, head: bytes) -> None:
        """Begin the exchange with an upstream."""
        exchange = self.exchange
        worker = self.worker
        exchange.upstream = upstream
        if exchange.left:
            self.state = _BODY
            self.deadline = worker.now + worker.settings.body_timeout
        else:
            self.state = _ANSWER
            self.deadline = worker.now + worker.settings.upstream_timeout
        upstream.agent.traffic.bytes_in += len(head)
        upstream.start(self, exchange.request, head, complete=not exchange.left)
        if self.reading_paused:
            self.regulate_reading()
        elif self.state is _BODY:
            self.transport.resume_reading()  # a new connection that the loop does not read yet

    def connected(self, upstream: Upstream) -> None:
        """A new connection is there: use it."""
        replay = self.exchange.replay
        if replay is None:
            self._send(upstream)
            return
        self.exchange.replay = None
        self._keep_rest()
        self._start(upstream, replay)

    def _body_received(self, data: bytes) -> None:
        """Pass a piece of the body on."""
        exchange = self.exchange
        upstream = exchange.upstream
        agent = exchange.agent
        if upstream is None or agent is None:
            return
        worker = self.worker
        size = len(data)
        exchange.bytes_in += size
        agent.traffic.bytes_in += size
        agent.traffic.bulk += size
        try:
            passed = exchange.take_body(data)
        except BadHead as error:
            self._abandon_upstream()
            self._refuse_head(error)
            return
        if exchange.left:
            self.deadline = worker.now + worker.settings.body_timeout
        else:
            self.state = _ANSWER
            upstream.request_sent = True
            if exchange.rest:
                self.reader.keep(exchange.rest)
            self._await_answer()
        if passed:
            upstream.transport.write(passed)

    # Waiting.

    @property
    def answering(self) -> bool:
        """Whether a request is complete, and its answer is not."""
        return self.state is _ANSWER or self.state is _WAIT

    def _wait(self, deadline: float) -> None:
        """Wait for something that is not the client's to send."""
        self.state = _WAIT
        limit = self.worker.now + self.worker.settings.body_timeout
        self.deadline = min(deadline, limit) if self.eof else deadline

    def _await_answer(self) -> None:
        """Set the deadline of an answer: for its beginning only, except where the client may be gone."""
        worker = self.worker
        if self.write_paused:
            worker.watch_writer(self)
        elif not self.exchange.status:
            self.deadline = worker.now + worker.settings.upstream_timeout
        elif self.eof:
            self.deadline = worker.now + worker.settings.body_timeout
        else:
            self.deadline = FOREVER

    def _hold(self, hold: Hold) -> None:
        """Keep the request until the agent's row changes, for a time or the rest of an earlier wait."""
        exchange = self.exchange
        now = self.worker.now
        if exchange.agent is not None:
            self._leave(exchange.agent, 0)
        exchange.held_until = exchange.held_until or now + hold.seconds
        exchange.holding = hold.agent
        hold.agent.waiting[self] = None
        self._wait(min(exchange.held_until, now + hold.pause))

    def _release(self) -> None:
        """Wait no more for a session or an agent."""
        exchange = self.exchange
        exchange.lookup = b""
        agent, exchange.holding = exchange.holding, None
        if agent is not None:
            agent.waiting.pop(self, None)

    def agent_changed(self, agent: Agent) -> None:
        """The row of the agent that the request is held for has changed."""
        self._release()
        exchange = self.exchange
        self._carry_out(self.worker.router.changed(exchange.request, self.session, agent, poll=exchange.poll))

    def _look_up(self, decision: Lookup) -> None:
        worker = self.worker
        if worker.feed_lost_for_good():
            self._refuse(pages.NO_FEED)
        elif worker.look_up(self, decision.digest):
            self.exchange.lookup = decision.digest
            self._wait(worker.now + LOOKUP_TIMEOUT + 1)
        else:
            self._carry_out(decision.otherwise)

    def looked_up(self, digest: bytes) -> None:
        """The manager's answer about a session is in the tables, or did not come in time."""
        if self.exchange.lookup == digest and self.state is _WAIT:
            self._release()
            self._route(self.exchange.request, may_look_up=False)

    def _waited(self) -> None:
        """The request has waited for as long as it may."""
        exchange = self.exchange
        agent = exchange.holding
        if agent is not None:
            self._release()
            paused = self.worker.now < exchange.held_until
            self._carry_out(self.worker.router.waited(exchange.request, agent, paused=paused))
        elif exchange.lookup:
            self.looked_up(exchange.lookup)
        else:
            self._refuse(pages.TOO_SLOW)

    def unreachable(self, agent: Agent) -> None:
        """Nothing listens at the agent's endpoint."""
        if not agent.name:
            self._refuse(pages.PORTAL_AWAY)
            return
        self.worker.report_dead(agent)
        self._carry_out(self.worker.router.unreachable(agent, held=bool(self.exchange.held_until)))

    # The answer of an upstream.

    @property
    def rechunk(self) -> bool:
        return self.exchange.rechunk

    def answer_head(self, response: Response) -> bytes:
        """Return the head of an answer as this client gets it, and decide how the exchange ends."""
        exchange = self.exchange
        worker = self.worker
        exchange.status = response.status
        exchange.replay = None
        exchange.rechunk = False
        if self.state is _BODY or worker.draining:
            # The body may never be read to its end: no further request can follow it.
            self.closing = True
        if response.length >= 0 and response.dated and exchange.request.version and not worker.settings.hsts_line:
            if not self.closing:
                head = response.plain
                if not head:
                    head = response.plain = client_head(response, b"")
                if response.length:
                    if self.write_paused:
                        self.worker.watch_writer(self)
                    else:
                        self.deadline = FOREVER
                return head
            if self.state is _ANSWER and not self.eof:
                head = response.last
                if not head:
                    head = response.last = client_head(response, b"Connection: close\r\n")
                self._await_answer()
                return head
        return self._altered_head(response)

    def _altered_head(self, response: Response) -> bytes:
        """Return a head to which the edge adds something."""
        exchange = self.exchange
        worker = self.worker
        additions = worker.settings.hsts_line
        if not response.dated:
            additions += worker.date_line
        if response.length < 0:
            if exchange.request.version:
                exchange.rechunk = True
                additions += b"Transfer-Encoding: chunked\r\n"
            else:
                self.closing = True
        if self.closing:
            additions += b"Connection: close\r\n"
        elif not exchange.request.version:
            additions += b"Connection: keep-alive\r\n"
        if self.state is _ANSWER:
            self._await_answer()
        return client_head(response, additions)

    def deliver(self, data: bytes, size: int) -> None:
        """Write an answer's head, joined with `size` bytes of its body."""
        exchange = self.exchange
        exchange.bytes_out += len(data)
        agent = exchange.agent
        if agent is not None:
            traffic = agent.traffic
            traffic.bytes_out += len(data)
            if not exchange.poll:
                traffic.bulk += size
        self.transport.write(data)

    def pass_on(self, data: bytes) -> None:
        """Write a later piece of an answer's body."""
        size = len(data)
        self.exchange.count_answer(size, size, self.worker.now)
        if self.eof:
            self.deadline = self.worker.now + self.worker.settings.body_timeout
        self.transport.write(data)

    def write(self, data: bytes) -> None:
        """Write an informational answer."""
        self.transport.write(data)

    def exchanged(self) -> None:
        """The answer is complete: end the connection, or be ready for the next request."""
        worker = self.worker
        exchange = self.exchange
        agent = exchange.agent
        exchange.upstream = exchange.agent = None
        if agent is not None:
            agent.in_flight -= 1
            if not agent.name:
                worker.leave_portal(self.remote)
            counters = agent.counters
            if counters is not None and not worker.log.on:
                counters[exchange.status // 100] += 1
            else:
                self._count(agent, exchange.status)
        exchange.status = 0
        if self.closing:
            self._finish(clean=self.state is _ANSWER)
            return
        self.state = _HEAD
        if exchange.body:
            self.reader.keep(exchange.body)
            exchange.body = b""
        if self.write_paused:
            worker.watch_writer(self)  # the next request waits until this answer has left
        else:
            self.deadline = worker.now + worker.settings.idle_timeout
            if self.reader.kept is not None:
                self._read_kept()
        if self.reading_paused:
            self.regulate_reading()

    def upgraded(self, upstream: Upstream, response: Response, rest: bytes) -> None:
        """The upstream accepted the upgrade: from here on the connection is a tunnel."""
        exchange, worker = self.exchange, self.worker
        agent, session = exchange.agent, self.session
        assert agent is not None
        early, exchange.body = exchange.body, b""
        self.regulate_reading()
        client = ClientEnd(worker, self.transport, agent, session, self.address or "")
        client.eof = self.eof
        head = client_head(response, b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        exchange.upstream = upstream.client = None
        self._leave(agent, 101)
        self.state = State.CLOSED
        worker.hand_over(self)
        tunnel(client, UpstreamEnd(worker, upstream.transport, agent), head, rest, early)

    def upstream_lost(self, *, untouched: bool) -> None:
        """The upstream's connection ended before the answer did."""
        exchange = self.exchange
        agent = exchange.agent
        exchange.upstream = None
        if agent is None:
            return
        if untouched and exchange.replay is not None and not agent.gone:
            # A kept-alive connection ended just as the request was sent (RFC 9110, 9.2.2): once more, on another.
            self._connect(agent)
            return
        if untouched and exchange.request.traits & SAFE and self.state is _ANSWER:
            decision = self.worker.router.dropped(agent, held=bool(exchange.held_until))
            if isinstance(decision, Hold):
                self.worker.report_dead(agent)
            self._carry_out(decision)
            return
        self._fail(pages.GONE_AWAY)

    def upstream_invalid(self, why: str) -> None:
        """The answer is not valid HTTP."""
        self._abandon_upstream()
        if self.exchange.agent is not None:
            self.worker.log_invalid(self.exchange.agent, self.exchange.request_id, why)
        self._fail(pages.BAD_ANSWER)

    def _abandon_upstream(self) -> None:
        upstream, self.exchange.upstream = self.exchange.upstream, None
        if upstream is not None:
            upstream.abandon()

    # The edge's own answers.

    def _refuse_head(self, error: BadHead) -> None:
        """Answer a request that cannot be understood; nothing after it can be either."""
        exchange = self.exchange
        self.reader.kept = None
        exchange.body = b""
        self.closing = True
        self.worker.counters.refused += 1
        if self.state is _HEAD:
            exchange.request = None  # there is none
            exchange.request_id = b""
        if exchange.status:
            self.transport.abort()
            return
        exchange.request_id = exchange.request_id or self.worker.request_id()
        answer = pages.failure(
            pages.bad_request(error.status, error.why),
            self.worker.date_line,
            exchange.request_id.decode(),
            page=False,
            close=True,
            body=True,
        )
        self._answer(answer, error.status, clean=False)

    def _refuse(self, failure: Failure, link: str = "") -> None:
        """Answer with a failure instead of an agent's answer."""
        request = self.exchange.request
        if request is None or self.worker.draining:
            self.closing = True
        clean = self._skip_body()
        answer = pages.failure(
            failure,
            self.worker.date_line + self.worker.settings.hsts_line,
            self.exchange.request_id.decode(),
            page=request is not None and request.wants_html(),
            close=self.closing,
            body=request is None or request.method != b"HEAD",
            link=link,
        )
        self._answer(answer, failure.status, clean=clean)

    def _redirect(self, location: bytes) -> None:
        """Redirect the browser."""
        clean = self._skip_body()
        date = self.worker.date_line + self.worker.settings.hsts_line
        self._answer(pages.redirect(location, date, close=self.closing), 303, clean=clean)

    def _skip_body(self) -> bool:
        """Drop the body without reading on: a rest of it ends the connection.  Return whether it was all here."""
        exchange = self.exchange
        request = exchange.request
        if request is None:
            return False
        body, exchange.body = exchange.body, b""
        if request.length and self.state is not _ANSWER and exchange.replay is None:
            if request.length < 0 or len(body) < request.length or self.state is _BODY:
                self.closing = True
                return False
            body = body[request.length :]
        if request.upgrade:
            self.closing = True
        if body:
            self.reader.kept = bytearray(body)
        return True

    def _answer(self, answer: bytes, status: int, *, clean: bool) -> None:
        self._release()
        exchange = self.exchange
        if exchange.agent is not None:
            self._leave(exchange.agent, status)
        elif exchange.request_id:
            self._count(None, status)
        self.transport.write(answer)
        if self.closing:
            self._finish(clean=clean)
            return
        self.state = _HEAD
        if self.write_paused:
            self.worker.watch_writer(self)
        else:
            self.deadline = self.worker.now + self.worker.settings.idle_timeout
            if self.reader.kept is not None:
                self.worker.soon(self._read_kept)
        if self.reading_paused:
            self.regulate_reading()

    def _finish(self, *, clean: bool) -> None:
        """Close after the last answer; read on for a moment when more input may be under way (RFC 9112, 9.6)."""
        self.reader.kept = None
        self.state = State.LINGER
        self.deadline = self.worker.now + self.worker.settings.body_timeout
        if clean or self.eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.deadline = self.worker.now + LINGER
        self.unsent = 0
        self.regulate_reading()
        self.transport.write_eof()

    def _fail(self, failure: Failure) -> None:
        """Answer with a failure; when a part of an answer has been passed on, abort so that it shows."""
        if self.exchange.status:
            self.transport.abort()
        else:
            self._refuse(failure)

    def _leave(self, agent: Agent, status: int) -> None:
        """Take the request off the agent's, and count the exchange unless it goes on elsewhere (0)."""
        self.exchange.agent = None
        agent.in_flight -= 1
        if not agent.name:
            self.worker.leave_portal(self.remote)
        self.exchange.status = 0
        if status:
            self._count(agent, status)

    def _count(self, agent: Agent | None, status: int) -> None:
        """Count an exchange that has ended, and log it."""
        worker = self.worker
        worker.counters.count(agent, status)
        if worker.log.on:
            worker.log.write(
                self.exchange,
                agent,
                status,
                remote=self.remote,
                session=self.session,
                now=worker.now,
                seconds=worker.clock() - self.exchange.started,
            )

    # The worker's orders.

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self.state is _HEAD and self.reader.kept is None and not self.write_paused:
            self._finish(clean=True)

    def revoke(self) -> None:
        """The session has ended: end its work in progress, but not the sign-out itself."""
        with_portal = self.exchange.agent is not None and not self.exchange.agent.name
        if (self.answering or self.state in {_BODY, State.STREAM}) and not with_portal:
            self.transport.abort()
        self.session = None
