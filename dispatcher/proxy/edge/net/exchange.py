"""One request and its answer between a client's connection and an upstream.

The head and the first bytes of a body are one write; each side is read only while the other one takes its bytes.
A request may wait before it is passed on: for its session, for its agent, or for a connection.
"""

from __future__ import annotations

from typing import Any, Final

from dispatcher.proxy.edge.http import field_names
from dispatcher.proxy.edge.http.cookie import SessionCookie
from dispatcher.proxy.edge.http.field_names import BadHead
from dispatcher.proxy.edge.http.request import IDEMPOTENT, SAFE, Request, upstream_head
from dispatcher.proxy.edge.http.response import Response, client_head
from dispatcher.proxy.edge.net.client_base import Client, State
from dispatcher.proxy.edge.net.clients import Clients
from dispatcher.proxy.edge.net.request_body import RequestBody
from dispatcher.proxy.edge.net.tunnel import ClientEnd, UpstreamEnd, tunnel
from dispatcher.proxy.edge.net.upstream import AWAIT, Receiver, Upstream, dense_pause
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.actions import Hold, Lookup
from dispatcher.proxy.edge.routing.settings import (
    CONNECT_TIMEOUT,
    FOREVER,
    FRESH_UPSTREAM,
    LOOKUP_TIMEOUT,
)
from dispatcher.proxy.edge.routing.table import Agent

_POLL_SECONDS: Final = 5  # an answer that lasts longer is a stream, even that of a poll
# On the hot path:
_BODY: Final = State.BODY
_ANSWER: Final = State.ANSWER
_WAIT: Final = State.WAIT


class Exchange(Receiver):
    """A request and its answer; a connection has one object and uses it for one request after the other.

    :ivar agent: the agent whose requests in flight include this one; :ivar holding: the agent it is held for.
    :ivar lookup: digest of the session that is being looked up; :ivar held_until: 0 before the first hold.
    :ivar body: bytes that came behind the head before they could be passed on; :ivar sending: the body under way.
    :ivar status: of the answer, 0 before its head was forwarded; :ivar replay: bytes for a retry.
    :ivar rechunk: the answer's body goes out in chunks; :ivar poll: the request does not count as use.
    """

    request: Any  # a Request, None before the first

    def __init__(self, clients: Clients, client: Client) -> None:
        self.clients = clients
        self.context = clients.context
        self.client = client
        self.cookie = SessionCookie(self.context.settings.cookie_name)
        self.agent: Agent | None = None
        self.holding: Agent | None = None
        self.upstream: Upstream | None = None
        self.held_until = self.started = 0.0
        self.bytes_in = self.bytes_out = self.status = 0
        self.poll = self.rechunk = False
        self.lookup = b""
        self.clear()

    def clear(self) -> None:
        """Clear the state of the last request."""
        self.request = None
        self.sending: RequestBody | None = None
        self.replay: bytes | None = None
        self.body = self.request_id = b""

    # The request.

    def dispatch(self, agent: Agent) -> None:
        """Send the request to an agent that runs, or to the portal."""
        context = self.context
        if agent.in_flight >= context.settings.in_flight:
            self.client.refuse(pages.TOO_BUSY)
            return
        if self.agent is None:
            if not agent.name and not self.clients.take_portal_slot(self.client.remote):
                self.client.refuse(pages.TOO_BUSY)
                return
            agent.in_flight += 1
            self.agent = agent
        idle = agent.idle
        if idle and self.replay is None:
            upstream = idle.pop()
            if self.request.traits & IDEMPOTENT or context.now - upstream.since < FRESH_UPSTREAM:
                self.connected(upstream)
                return
            idle.append(upstream)
        self._connect(agent)

    def _connect(self, agent: Agent) -> None:
        self._wait(self.context.now + CONNECT_TIMEOUT + 1)
        self.context.connect(agent, self)

    def wants(self, agent: Agent) -> bool:
        """Whether a connection to an agent is still wanted."""
        return self.client.state is _WAIT and self.agent is agent and self.upstream is None

    def unreachable(self, agent: Agent) -> None:
        """Nothing listens at the agent's endpoint."""
        if not agent.name:
            self.client.refuse(pages.PORTAL_AWAY)
            return
        self.context.manager.report_dead(agent)
        self.client.carry_out(self.context.router.unreachable(agent, held=bool(self.held_until)))

    def connected(self, upstream: Upstream) -> None:
        """Send the request over a connection: in one write the head and the part of the body that is here."""
        context = self.context
        client = self.client
        request = self.request
        agent = upstream.agent
        head, self.replay = self.replay, None
        if head is None:
            head = self._head(request, agent)
            if request.length:
                try:
                    head += self._begin_body(request.length)
                except BadHead as error:
                    agent.idle.append(upstream)  # it has seen nothing of this request
                    client.refuse_head(error)
                    return
                if self.sending is None and upstream.used and request.traits & IDEMPOTENT:
                    self.replay = head
            elif request.traits & (IDEMPOTENT if upstream.used else SAFE):
                # On a new connection too: an agent that was just killed may have taken it.  The second try finds
                # no listener, and is held until the agent is back.
                self.replay = head
        if self.body and not request.upgrade:  # it belongs to the next request
            client.reader.keep(self.body)
            self.body = b""
        self.upstream = upstream
        complete = self.sending is None
        if complete:
            client.state = _ANSWER
            client.deadline = context.now + context.settings.upstream_timeout
        else:
            client.deadline = context.now + context.settings.body_timeout
        agent.traffic.bytes_in += len(head)
        if client.write_paused:
            upstream.pause_reading()
        upstream.client = self
        upstream.request = request
        upstream.request_sent = complete
        upstream.informational = 0
        upstream.mode = AWAIT
        upstream.transport.write(head)
        if client.reading_paused or client.reader.kept is not None:
            client.regulate_reading()
        elif not complete:
            client.transport.resume_reading()  # a new connection that the loop does not read yet

    def _begin_body(self, length: int) -> bytes:
        """Begin forwarding the body; return the part that has arrived."""
        self.client.state = _BODY
        body, self.body = self.body, b""
        self.sending = sending = RequestBody(length)
        first = sending.take(body) if body else b""
        if not sending.left:
            self._sent(sending)
        return first

    def _head(self, request: Request, agent: Agent) -> bytes:
        """Return the head for an upstream: the portal gets the whole Cookie field, an agent the other cookies."""
        client, cookie = self.client, self.cookie
        field = request.fields.get(field_names.COOKIE, b"")
        identity = b""
        if agent.name:
            identity = agent.identity
            if field:
                cookie.read(field)
                field = cookie.others
        host = request.host or self.context.settings.public_host or b"localhost"
        return upstream_head(request, host, field, client.remote, client.scheme, identity, self.request_id)

    def body_received(self, data: bytes) -> None:
        """Pass a piece of the body on."""
        upstream, agent, sending, client = self.upstream, self.agent, self.sending, self.client
        if upstream is None or agent is None or sending is None:
            return
        size = len(data)
        self.bytes_in += size
        agent.traffic.bytes_in += size
        agent.traffic.bulk += size
        try:
            passed = sending.take(data)
        except BadHead as error:
            self.abandon_upstream()
            client.refuse_head(error)
            return
        if sending.chunks:
            client.pause_for(dense_pause(agent, size, sending.chunks, self.context.clock()))
        if sending.left:
            self.await_body()
        else:
            client.state = _ANSWER
            upstream.request_sent = True
            self._sent(sending)
            self.await_answer()
        if passed:
            upstream.transport.write(passed)

    def _sent(self, sending: RequestBody) -> None:
        self.sending = None
        if sending.rest:
            self.client.reader.keep(sending.rest)

    def drop_body(self) -> bool:
        """Drop the body without reading on: a rest of it ends the connection.  Return whether it was all here."""
        request, client = self.request, self.client
        if request is None:
            return False
        body, self.body = self.body, b""
        if request.length and client.state is not _ANSWER and self.replay is None:
            if request.length < 0 or len(body) < request.length or client.state is _BODY:
                client.closing = True
                return False
            body = body[request.length :]
        if request.upgrade:
            client.closing = True
        if body:
            client.reader.keep(body)
        return True

    # Waiting.

    def _wait(self, deadline: float) -> None:
        """Wait for something that is not the client's to send."""
        client = self.client
        client.state = _WAIT
        client.deadline = (
            min(deadline, self.context.now + self.context.settings.half_closed) if client.eof else deadline
        )

    def await_answer(self) -> None:
        """Set the deadline of an answer: for its beginning only, except where the client may be gone."""
        context, client = self.context, self.client
        if client.state is not _ANSWER:
            return  # the body sets it
        if client.write_paused:
            self.clients.watch_writer(client)
        elif not self.status:
            client.deadline = context.now + context.settings.upstream_timeout
        elif client.eof:
            client.deadline = context.now + context.settings.half_closed
        else:
            client.deadline = FOREVER

    def hold(self, hold: Hold) -> None:
        """Keep the request until the agent's row changes, for a time or the rest of an earlier wait."""
        now = self.context.now
        if self.agent is not None:
            self.leave(self.agent, 0)
        self.held_until = self.held_until or now + hold.seconds
        self.holding = hold.agent
        hold.agent.waiting[self] = None
        self._wait(min(self.held_until, now + hold.pause))

    def release(self) -> None:
        """Wait no more for a session or an agent."""
        self.lookup = b""
        agent, self.holding = self.holding, None
        if agent is not None:
            agent.waiting.pop(self, None)

    def agent_changed(self, agent: Agent) -> None:
        """The row of the agent that the request is held for has changed."""
        self.release()
        client = self.client
        client.carry_out(self.context.router.changed(self.request, client.session, agent, poll=self.poll))

    def look_up(self, decision: Lookup) -> None:
        """Wait for the manager's answer about the session."""
        context = self.context
        if context.manager.lost_for_good():
            self.client.refuse(pages.NO_FEED)
        elif context.manager.look_up(self, decision.digest):
            self.lookup = decision.digest
            self._wait(context.now + LOOKUP_TIMEOUT + 1)
        else:
            self.client.carry_out(decision.otherwise)

    def looked_up(self, digest: bytes) -> None:
        """The manager's answer about a session is in the tables, or did not come in time."""
        if self.lookup == digest and self.client.state is _WAIT:
            self.release()
            self.client.route(self.request, False)

    def waited(self) -> None:
        """The request has waited for as long as it may."""
        agent = self.holding
        if agent is not None:
            self.release()
            paused = self.context.now < self.held_until
            self.client.carry_out(self.context.router.waited(self.request, agent, paused=paused))
        elif self.lookup:
            self.looked_up(self.lookup)
        else:
            self.client.refuse(pages.TOO_SLOW)

    # The answer.

    def answer_head(self, response: Response) -> bytes:
        """Return the head of an answer as this client gets it, and decide how the exchange ends."""
        context = self.context
        client = self.client
        self.status = response.status
        self.replay = None
        self.rechunk = False
        if client.state is _BODY or context.draining:
            # The body may never be read to its end: no further request can follow it.
            client.closing = True
        additions = context.settings.hsts_line
        if self.agent is not None and self.agent.name:
            cached = (self.request.by_hand and context.settings.page_cache) or response.cached
            if cached:
                additions += b"Cache-Control: private, " + cached + b"\r\n" + context.settings.vary
            else:
                additions += context.settings.agent_lines
        elif response.status == 404 and client.session is not None:
            context.warn_once(
                "a path under proxy.prefix belongs to the portal: if an app uses it, choose another prefix",
                client.session.agent,
                self.request.target,
            )
        if self.request.bearer:
            additions += b"Vary: Authorization\r\n"
        if not response.dated:
            additions += context.date_line
        if response.length < 0:
            if self.request.version:
                self.rechunk = True
                additions += b"Transfer-Encoding: chunked\r\n"
            else:
                client.closing = True
        if client.closing:
            additions += b"Connection: close\r\n"
        elif not self.request.version:
            additions += b"Connection: keep-alive\r\n"
        return client_head(response, additions)

    def deliver(self, data: bytes, size: int) -> None:
        """Write an answer's head, joined with `size` bytes of its body."""
        self.bytes_out += len(data)
        agent = self.agent
        if agent is not None:
            traffic = agent.traffic
            traffic.bytes_out += len(data)
            if not self.poll:
                traffic.bulk += size
        self.client.transport.write(data)

    def pass_on(self, data: bytes) -> None:
        """Write a later piece of an answer's body."""
        size = len(data)
        client = self.client
        now = self.context.now
        self.bytes_out += size
        agent = self.agent
        if agent is not None:
            traffic = agent.traffic
            traffic.bytes_out += size
            if not self.poll or now - self.started > _POLL_SECONDS:
                traffic.bulk += size
        if client.eof:
            client.deadline = now + self.context.settings.half_closed
        client.transport.write(data)

    def inform(self, data: bytes) -> None:
        """Write an informational answer."""
        self.client.transport.write(data)

    def exchanged(self) -> None:
        """The answer is complete."""
        context = self.context
        client = self.client
        agent = self.agent
        self.upstream = self.agent = None
        if agent is not None:
            agent.in_flight -= 1
            if not agent.name:
                self.clients.free_portal_slot(client.remote)
            counters = agent.counters
            if counters is not None and not context.log.on:
                counters[self.status // 100] += 1
            else:
                self.count(agent, self.status)
        self.status = 0
        if self.body:
            client.reader.keep(self.body)
            self.body = b""
        client.proceed(client.state is _ANSWER)

    def upgraded(self, upstream: Upstream, response: Response, rest: bytes) -> None:
        """The upstream accepted the upgrade: from here on the connection is a tunnel."""
        client, agent = self.client, self.agent
        assert agent is not None
        early, self.body = self.body, b""
        client.regulate_reading()
        end = ClientEnd(self.clients, client.transport, agent, client.session, client.address or "")
        end.eof = client.eof
        end.held = upstream.write_paused
        far_end = UpstreamEnd(self.clients, upstream.transport, agent)
        far_end.held = client.write_paused
        head = client_head(response, b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        self.upstream = upstream.client = None
        self.leave(agent, 101)
        client.state = State.CLOSED
        self.clients.hand_over(client)
        tunnel(end, far_end, head, rest, early)

    def upstream_lost(self, *, untouched: bool) -> None:
        """The upstream's connection ended before the answer did; `untouched`: before its first byte."""
        agent = self.agent
        self.upstream = None
        if agent is None:
            return
        if untouched and self.replay is not None and not agent.gone:
            # A kept-alive connection ended just as the request was sent (RFC 9110, 9.2.2): once more, on another.
            self._connect(agent)
        elif (
            untouched
            and self.request.traits & SAFE
            and not self.request.length  # a body cannot be sent again
            and self.client.state is _ANSWER
        ):
            decision = self.context.router.dropped(agent, held=bool(self.held_until))
            if isinstance(decision, Hold):
                self.context.manager.report_dead(agent)
            self.client.carry_out(decision)
        else:
            self._fail(pages.GONE_AWAY)

    def upstream_invalid(self, why: str) -> None:
        """The answer is not valid HTTP."""
        self.abandon_upstream()
        if self.agent is not None:
            self.context.log_invalid(self.agent, self.request_id, why)
        self._fail(pages.BAD_ANSWER)

    def _fail(self, failure: pages.Failure) -> None:
        """Answer with a failure; when a part of an answer has been passed on, abort so that it shows."""
        if self.status:
            self.client.transport.abort()
        else:
            self.client.refuse(failure)

    def regulate_reading(self) -> None:
        """The upstream takes no more of the body, or takes more again."""
        client = self.client
        client.regulate_reading()
        if client.state is _BODY:
            self.await_body()

    def await_body(self) -> None:
        """Set the deadline of the next piece of a body, which the client sends late or the upstream takes late."""
        settings = self.context.settings
        seconds = settings.upstream_timeout if self.client.reading_paused else settings.body_timeout
        self.client.deadline = self.context.now + seconds

    # The end.

    def abandon_upstream(self) -> None:
        """Close the upstream: the exchange cannot go on."""
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abandon()

    def client_lost(self) -> None:
        """The client is gone."""
        self.abandon_upstream()
        self.release()
        if self.agent is not None:
            self.leave(self.agent, self.status or 499)

    def leave(self, agent: Agent, status: int) -> None:
        """Take the request off the agent's, and count the exchange unless it goes on elsewhere (0)."""
        self.agent = None
        agent.in_flight -= 1
        if not agent.name:
            self.clients.free_portal_slot(self.client.remote)
        self.status = 0
        if status:
            self.count(agent, status)

    def count(self, agent: Agent | None, status: int) -> None:
        """Count an exchange that has ended, and log it."""
        context, client = self.context, self.client
        context.counters.count(agent, status)
        if context.log.on:
            seconds = context.clock() - self.started
            context.log.write(self, agent, status, client.remote, client.session, context.now, seconds)
