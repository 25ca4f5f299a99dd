"""A client's connection: it reads requests, carries the router's decisions out and closes after the last answer.

It works on one request at a time: it reads a head, has it routed, and leaves the rest to its exchange; bytes that
come early wait.  No task, future or timer belongs to a request: the timer wheel of `clients` checks `deadline`
twice a second, and everything else happens in the callbacks of the two transports.
"""

from __future__ import annotations

import asyncio
from typing import Final

from dispatcher.proxy.edge.http import field_names
from dispatcher.proxy.edge.http.field_names import BadHead, HeadTooLong
from dispatcher.proxy.edge.http.head_reader import HeadReader
from dispatcher.proxy.edge.http.oversized import Oversized
from dispatcher.proxy.edge.http.request import Request, portal_lines
from dispatcher.proxy.edge.http.trusted_proxies import usable_request_id
from dispatcher.proxy.edge.net.client_base import Client, State
from dispatcher.proxy.edge.net.clients import Clients
from dispatcher.proxy.edge.net.event_streams import EventStreams
from dispatcher.proxy.edge.net.exchange import Exchange
from dispatcher.proxy.edge.net.request_body import RequestBody
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.actions import (
    PORTAL,
    Decision,
    Events,
    Hold,
    Page,
    Pass,
    Portal,
    Redirect,
    Refuse,
    Wake,
)
from dispatcher.proxy.edge.routing.settings import (
    FOREVER,
    LINGER,
    LINGER_BYTES,
    PIPELINED,
    PORTAL_BODY,
    SMALL_BODY,
    WRITE_HIGH,
)
from dispatcher.proxy.edge.routing.table import Agent, Session

# On the hot path:
_HEAD: Final = State.HEAD
_BODY: Final = State.BODY
_ANSWER: Final = State.ANSWER
_WAIT: Final = State.WAIT


class Connection(Client):
    """A client's connection; the object serves one client after the other."""

    def __init__(self, clients: Clients, events: EventStreams) -> None:
        self.clients = clients
        self.context = clients.context
        self.events = events
        settings = self.context.settings
        self.exchange = Exchange(clients, self)
        self.reader = HeadReader(settings.head_bytes, settings.head_fields)
        self._collecting: RequestBody | None = None
        self.address: str | None = None
        self.deadline = FOREVER
        self.session: Session | None = None
        self.remote = b""
        self.unsent = 0
        self.trusted = False
        self.reset()

    def reset(self) -> None:
        """Reset all state of the client, to serve the next one."""
        self.state = _HEAD
        self.write_paused = self.reading_paused = self.closing = self.eof = self.trusted = False
        self.scheme = self.context.settings.scheme
        self.to_https = self.same_port = self._next_due = self._pausing = False
        self.reader.kept = None
        self.exchange.clear()

    # The transport's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.deadline = self.context.now + self.context.settings.head_timeout
        if not self.clients.admit(self):
            self.closing = True
            self.refuse(pages.FULL)

    def data_received(self, data: bytes) -> None:
        state = self.state
        if state is _HEAD:
            reader = self.reader
            if self.write_paused or self._next_due:
                self._keep(data)
                return
            incomplete = reader.kept is not None
            try:
                request = reader.read(data)
            except BadHead as error:
                self.refuse_head(error)
                return
            if request is not None:
                self._begin(request)
            elif not incomplete and reader.kept is not None:
                self.deadline = self.context.now + self.context.settings.head_timeout
        elif state is _BODY:
            self.exchange.body_received(data)
        elif state is _ANSWER or state is _WAIT:
            self._keep(data)
        elif state is State.COLLECT:
            self._collect(data)
        elif state is State.LINGER:
            self.unsent += len(data)
            if self.unsent > LINGER_BYTES:
                self.transport.abort()

    def eof_received(self) -> bool:
        """The client closed its sending side; its request is answered (RFC 9112, 9.6), within `half_closed`.

        A client that closed both directions looks the same.  The reset that the first bytes of the answer cause
        reveals it, or this limit.
        """
        self.eof = True
        if self.is_answering() or self.state is State.STREAM:
            self.closing = True
            self.deadline = min(self.deadline, self.context.now + self.context.settings.half_closed)
            return self.transport.can_write_eof()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.state, state = State.CLOSED, self.state
        self._end_collecting()
        exchange = self.exchange
        if exchange.agent is not None or state is _WAIT:
            exchange.client_lost()
        elif state is State.STREAM:
            self.events.forget(self)
            exchange.count(None, 200)
        self.clients.forget(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.exchange.upstream is not None:
            self.exchange.upstream.pause_reading()
        if self.state is not _WAIT:
            self.clients.watch_writer(self)

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.exchange.upstream is not None:
            self.exchange.upstream.resume_reading()
        context = self.context
        if self.state is _HEAD:
            self.deadline = context.now + context.settings.idle_timeout
            self._read_kept()
        elif self.state is _BODY:
            self.exchange.await_body()
        elif self.state is _ANSWER:
            self.exchange.await_answer()
        elif self.state is State.STREAM:
            self.events.resume(self)

    def expired(self) -> None:
        """Act on the deadline, which has passed."""
        context = self.context
        state = self.state
        answered = self.exchange.status
        if self.write_paused and state is not _WAIT:
            if not self.clients.still_writing(self):
                self.transport.abort()
        elif state is State.STREAM:
            self.events.ping(self)
        elif state is _WAIT:
            self.deadline = FOREVER
            self.exchange.waited()
        elif state is State.COLLECT or (state is _BODY and not answered):
            failure = pages.TOO_SLOW if state is _BODY and self.reading_paused else pages.SLOW_REQUEST
            self._end_collecting()
            self.exchange.abandon_upstream()
            self.closing = True
            self.refuse(failure)
        elif state is _ANSWER and not answered and not self.eof:
            self.exchange.abandon_upstream()
            self.refuse(pages.TOO_SLOW)
        elif state is _HEAD and self.reader.kept is not None:
            self.refuse_head(BadHead("a head that did not arrive in time", 408))
        elif state is _HEAD:
            self.state = State.LINGER
            self.deadline = context.now + LINGER
            self.transport.close()
        else:
            self.deadline = FOREVER
            self.transport.abort()

    # Back-pressure.

    def regulate_reading(self) -> None:
        """Read from the client only what can be forwarded, or buffered within `WRITE_HIGH` and `PIPELINED`.

        Called after a change of any reason not to read.
        """
        upstream = self.exchange.upstream
        kept = self.reader.kept
        wait = (
            self._pausing
            or (upstream is not None and upstream.write_paused)
            or len(self.exchange.body) > WRITE_HIGH
            or (
                kept is not None
                and (
                    (self.write_paused and self.state is _HEAD)
                    or (len(kept) > PIPELINED and (self.state is not _HEAD or self._next_due))
                )
            )
        )
        if wait != self.reading_paused:
            self.reading_paused = wait
            if wait:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def pause_for(self, seconds: float) -> None:
        """Do not read for a while."""
        if seconds:
            self._pausing = True
            self.regulate_reading()
            self.context.loop.call_later(seconds, self._end_pause)

    def _end_pause(self) -> None:
        self._pausing = False
        if self.reading_paused and self.state is not State.CLOSED:
            self.regulate_reading()

    def _keep(self, data: bytes) -> None:
        """Buffer bytes: the next request, or a body that must wait."""
        if self.state is _WAIT or (self.state is _ANSWER and self.exchange.request.upgrade):
            self.exchange.body += data
        else:
            self.reader.keep(data)
        self.regulate_reading()

    def _read_kept(self) -> None:
        """Begin the next request if it has arrived and may begin."""
        self._next_due = False
        if self.state is _HEAD and not self.write_paused and self.reader.kept is not None:
            try:
                request = self.reader.read_kept()
            except BadHead as error:
                self.refuse_head(error)
                return
            if request is not None:
                self._begin(request)
            elif self.reader.kept is not None:
                self.deadline = self.context.now + self.context.settings.head_timeout
        if self.reading_paused:
            self.regulate_reading()

    # A request.

    def _begin(self, request: Request) -> None:
        context = self.context
        exchange = self.exchange
        reader = self.reader
        exchange.request = request
        exchange.body = reader.rest
        exchange.bytes_in = request.size
        exchange.bytes_out = 0
        exchange.held_until = 0.0
        exchange.request_id = context.request_id()
        exchange.started = context.clock() if context.log.on else context.now
        self.closing = request.close or self.eof or context.draining
        if self.trusted:
            self.remote, self.scheme, host = self.clients.proxies.client_of(self.address or "", request.fields)
            if host:
                request.host = host
            exchange.request_id = usable_request_id(request.fields) or exchange.request_id
        if self.to_https:
            self.closing = True
            self.exchange.poll = False
            self.carry_out(context.router.to_https(request, same_port=self.same_port))
        else:
            self.route(request, True)

    def route(self, request: Request, may_look_up: bool) -> None:
        """Route the request, and carry out the decision."""
        context = self.context
        session = None
        digest = b""
        if request.bearer:
            self._route_token(request)
            return
        field = request.fields.get(field_names.COOKIE)
        if field is not None:
            cookie = self.exchange.cookie
            cookie.read(field)
            digest = cookie.digest
            session = context.tables.sessions.get(digest)
            if session is not None and session.expires <= context.now:
                session = None
        decision = context.router.route(request, session, context.now, self.scheme, digest if may_look_up else b"")
        if session is not self.session and session is not None and decision is not PORTAL:
            self.clients.bind(self, session)
        self.exchange.poll = False
        self.carry_out(decision)

    def _route_token(self, request: Request) -> None:
        """Route a request with an API token; one that is not in the table is not looked up: all are."""
        context = self.context
        token = context.tables.tokens.get(request.bearer)
        if token is not None and token.expires <= context.now:
            token = None
        self.exchange.poll = False
        if token is None and context.manager.lost_for_good():
            self.refuse(pages.NO_FEED)
            return
        decision = context.router.by_token(request, token, context.now)
        if token is not None and token is not self.session:
            self.clients.bind(self, token)
        self.carry_out(decision)

    def carry_out(self, decision: Decision) -> None:
        """Do what the router has decided."""
        exchange = self.exchange
        if isinstance(decision, Pass):
            exchange.poll = decision.poll
            exchange.dispatch(decision.agent)
        elif isinstance(decision, Portal):
            self._to_portal()
        elif isinstance(decision, Hold):
            exchange.hold(decision)
        elif isinstance(decision, Wake):
            self.context.manager.wake(decision.agent)
            self.carry_out(decision.then)
        elif isinstance(decision, Page):
            exchange.request = decision.request
            self._to_portal()
        elif isinstance(decision, Refuse):
            if decision.failure is pages.SERVICE_WORKER and self.session is not None:
                self.context.warn_once(
                    "an app's service worker is refused: it would cover the sign-in pages; see proxy.routing",
                    self.session.agent,
                    exchange.request.target,
                )
            self.refuse(decision.failure, decision.link)
        elif isinstance(decision, Redirect):
            self._redirect(decision)
        elif isinstance(decision, Events):
            self._stream(decision.agent)
        else:
            exchange.look_up(decision)

    def _to_portal(self) -> None:
        """Send the request to the portal once its body is complete.

        Any client may send to the portal, at any speed, and the portal has few slots.  Until a body is complete it
        uses memory only, limited for each connection (`PORTAL_BODY`) and in total: above `most_collected` a
        worker accepts only as much as a sign-in needs (`SMALL_BODY`), so a full buffer locks no user out.
        """
        exchange = self.exchange
        exchange.poll = True
        exchange.replay = None  # an agent's head
        request = exchange.request
        try:
            request.lines = portal_lines(request.lines)
        except BadHead as error:
            self.refuse_head(error)
            return
        if not request.length:
            exchange.dispatch(self.context.portal)
            return
        self.state = State.COLLECT
        self.deadline = self.context.now + self.context.settings.body_timeout  # for all of it
        self._collecting = RequestBody(request.length)
        expects, request.expects = request.expects, False  # the edge answers, not the portal
        early, exchange.body = exchange.body, b""
        if early:
            self._collect(early)
        if self.state is State.COLLECT and expects:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110, 10.1.1

    def _collect(self, data: bytes) -> None:
        """Add a part of a body for the portal; forward the request when the body is complete."""
        exchange, context, body = self.exchange, self.context, self._collecting
        assert body is not None
        exchange.bytes_in += len(data)
        exchange.body += data
        context.collected += len(data)
        try:
            body.take(data)
        except BadHead as error:
            self._end_collecting()
            self.refuse_head(error)
            return
        size = len(exchange.body)
        if not body.left:
            self._end_collecting()
            exchange.dispatch(context.portal)
        elif size > PORTAL_BODY or (context.collected > context.most_collected and size > SMALL_BODY):
            self._end_collecting()
            self.refuse(pages.TOO_LARGE if size > PORTAL_BODY else pages.TOO_BUSY)

    def _end_collecting(self) -> None:
        if self._collecting is not None:
            self._collecting = None
            self.context.collected -= len(self.exchange.body)

    def _stream(self, agent: Agent) -> None:
        """Become an event stream."""
        session = self.session
        if session is None or self.events.full(session):
            self.refuse(pages.TOO_BUSY)
            return
        self.state = State.STREAM
        self.closing = True
        self.exchange.body = b""
        self.events.open(self, agent)

    # The edge's own answers.

    def refuse_head(self, error: BadHead) -> None:
        """Refuse an invalid request; bytes after it cannot be parsed either."""
        exchange = self.exchange
        self.reader.kept = None
        exchange.body = b""
        self.closing = True
        self.context.counters.refused += 1
        if self.state is _HEAD:
            exchange.request = None  # there is none
            exchange.request_id = b""
        if exchange.status:
            self.transport.abort()
            return
        exchange.request_id = exchange.request_id or self.context.request_id()
        failure, page, lines = pages.bad_request(error.status, error.why), False, self.context.date_line
        if isinstance(error, HeadTooLong):
            found = Oversized(error.part)
            page = found.page
            if found.names:
                failure = pages.too_many_cookies(len(error.part))
                lines += found.lines(self.context.settings.domain if self.context.settings.subdomain else b"")
        request_id = exchange.request_id.decode()
        answer = pages.failure(failure, lines, request_id, page=page, close=True, body=True)
        self._answer(answer, error.status, clean=False)

    def refuse(self, failure: pages.Failure, link: str = "") -> None:
        """Answer with a failure instead of an agent's answer."""
        request = self.exchange.request
        if request is None or self.context.draining:
            self.closing = True
        page = request is not None and request.wants_html()
        if page and failure.status in {502, 504} and failure is not pages.BAD_ANSWER:  # which is logged
            self.context.log_failure(self.exchange.agent, self.exchange.request_id, failure.title)
        clean = self.exchange.drop_body()
        answer = pages.failure(
            failure,
            self._own_lines(),
            self.exchange.request_id.decode(),
            page=page,
            close=self.closing,
            body=request is None or request.method != b"HEAD",
            link=link,
        )
        self._answer(answer, failure.status, clean=clean)

    def _own_lines(self) -> bytes:
        lines = self.context.date_line
        return lines if self.to_https else lines + self.context.settings.hsts_line  # RFC 6797, 7.2

    def _redirect(self, decision: Redirect) -> None:
        clean = self.exchange.drop_body()
        answer = pages.redirect(
            decision.location, self._own_lines() + decision.lines, close=self.closing, status=decision.status
        )
        self._answer(answer, decision.status, clean=clean)

    def _answer(self, answer: bytes, status: int, *, clean: bool) -> None:
        exchange = self.exchange
        exchange.release()
        exchange.replay = exchange.sending = None
        if exchange.agent is not None:
            exchange.leave(exchange.agent, status)
        elif exchange.request_id:
            exchange.count(None, status)
        self.transport.write(answer)
        self.proceed(clean)

    def proceed(self, clean: bool) -> None:
        """An answer is written: end the connection, or be ready for the next request."""
        if self.closing:
            self._finish(clean=clean)
            return
        context = self.context
        self.state = _HEAD
        if self.write_paused:
            self.clients.watch_writer(self)  # the next request waits until this answer has left
        else:
            self.deadline = context.now + context.settings.idle_timeout
            if self.reader.kept is not None:
                self._next_due = True
                context.loop.call_soon(self._read_kept)
        if self.reading_paused or self._next_due:
            self.regulate_reading()

    def _finish(self, *, clean: bool) -> None:
        """Close after the last answer; read for a moment if more input may arrive (RFC 9112, 9.6)."""
        self.reader.kept = None
        self.state = State.LINGER
        self.deadline = self.context.now + self.context.settings.body_timeout
        if clean or self.eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.deadline = self.context.now + LINGER
        self.unsent = 0
        self.regulate_reading()
        self.transport.write_eof()

    # The worker's orders.

    def close_if_idle(self) -> None:
        """Close the connection unless a request is in progress."""
        if self.state is _HEAD and self.reader.kept is None and not self.write_paused:
            self._finish(clean=True)

    def count_use(self) -> None:
        """Count a request under way as use, a download or an upload for example; called at each report."""
        exchange = self.exchange
        agent = exchange.agent
        if agent is None or not agent.name:
            return
        if self.session is not None:
            self.context.router.use(self.session)
        # An event stream is open in every tab; it is use only by what flows.
        events = b"text/event-stream" in exchange.request.fields.get(field_names.ACCEPT, b"")
        if not exchange.poll and not events:
            agent.traffic.use += 1

    def revoke(self) -> None:
        """The session has ended: end its work in progress, but not the sign-out itself."""
        with_portal = self.exchange.agent is not None and not self.exchange.agent.name
        if (self.is_answering() or self.state in {_BODY, State.STREAM}) and not with_portal:
            self.transport.abort()
        self.session = None
