"""A client's connection: its state, its waiting, and the answers that are the edge's own.  Touches its transport.

`Exchange` adds passing requests and answers on, `Client` reading and the transport's callbacks.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.headers import BadHead
from dispatcher.proxy.edge.http.request import Request
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.pages import Failure
from dispatcher.proxy.edge.routing.settings import LINGER, WRITE_HIGH

if TYPE_CHECKING:
    from dispatcher.proxy.edge.net.upstream import Upstream
    from dispatcher.proxy.edge.routing.table import Agent, Session
    from dispatcher.proxy.edge.worker import Worker

# What the connection is doing.
HEAD = 0  # between requests, or in the middle of a head
BODY = 1  # a request was passed on and its body still comes
ANSWER = 2  # the request is complete, the answer is not
WAIT = 3  # the request cannot be passed on yet: lookup, held, connecting
STREAM = 4  # an event stream of the edge's own
LINGER_STATE = 5  # the last word was said
CLOSED = 6
COLLECT = 7  # the body of a request for the portal comes, and nobody has seen anything of it

FOREVER = float("inf")


class Connection(asyncio.Protocol):
    """A client's connection.

    :ivar address: of the peer, or what a trusted PROXY header says; :ivar deadline: when `expired` is called.
    :ivar rechunk: the answer's body goes out in chunks; :ivar write_paused: the client reads too slowly.
    :ivar reading_paused: the client is not read, see `regulate_reading`.
    :ivar agent: whose requests under way this one counts among; :ivar holding: whose state it waits for.
    """

    __slots__ = (
        "address",
        "agent",
        "block",
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
        "model",
        "outgoing",
        "outgoing_agent",
        "parked",
        "parked_for",
        "partial",
        "poll",
        "proto",
        "reading_paused",
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
        self.block = b""
        self.model: Request | None = None
        self.outgoing = b""
        self.outgoing_agent: Agent | None = None
        self.bytes_in = self.bytes_out = self.spoke = 0
        self.started = 0.0
        self.trusted = False
        self.reset()

    def reset(self) -> None:
        """Be as new, for the next connection; what was learned of a client's field lines may come in useful."""
        if self.trusted:  # they meant more than they will
            self.block, self.model, self.outgoing_agent = b"", None, None
        self.state = HEAD
        self.write_paused = self.reading_paused = False
        self.closing = self.eof = self.poll = self.rechunk = self.trusted = False
        self.proto = self.worker.settings.scheme
        self.status = 0
        self.request_id = b""
        self.request = None

    def expired(self) -> None:
        """The deadline has passed."""
        raise NotImplementedError

    def proceed(self) -> None:
        """Go on with what is already here."""
        raise NotImplementedError

    # The edge's own answers.

    def refuse(self, error: BadHead) -> None:
        """Answer a request that cannot be understood; nothing after it can be either."""
        self.partial = None
        self.body = b""
        self.closing = True
        self.worker.refused += 1
        if self.state == HEAD:
            self.request = None  # there is none
            self.request_id = b""
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
            self.settle(self.agent, status)
        elif self.request_id:
            self.worker.count(self, None, status)
        self.transport.write(answer)
        if self.closing:
            self.finish(clean=clean)
        else:
            self.state = HEAD
            if self.write_paused:
                self.worker.watch_writer(self)
            else:
                self.deadline = self.worker.now + self.worker.settings.idle_timeout
                if self.partial is not None:
                    self.worker.soon(self.proceed)
            if self.reading_paused:
                self.regulate_reading()

    def finish(self, *, clean: bool) -> None:
        """Close after the last answer; listen on for a moment when more input may be under way (RFC 9112, 9.6)."""
        self.partial = None
        self.state = LINGER_STATE
        self.deadline = self.worker.now + self.worker.settings.body_timeout
        if clean or self.eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.deadline = self.worker.now + LINGER
        self.spoke = 0
        self.regulate_reading()
        self.transport.write_eof()

    def fail(self, failure: Failure) -> None:
        """Say that there is no answer; when a part of one has been passed on, break off so that it shows."""
        if self.status:
            self.transport.abort()
        else:
            self.say(failure)

    def settle(self, agent: Agent, status: int) -> None:
        """Leave the agent that works on the request, and count the exchange unless it goes on elsewhere (0)."""
        self.agent = None
        agent.in_flight -= 1
        if not agent.name:
            self.worker.leave_portal(self.remote)
        self.status = 0
        if status:
            self.worker.count(self, agent, status)

    def drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.leave()

    # Back-pressure.

    def regulate_reading(self) -> None:
        """Read from the client only what can be passed on, or kept within `WRITE_HIGH`.

        Called whenever one of the reasons not to read may have appeared or gone.
        """
        upstream = self.upstream
        wait = (
            (upstream is not None and upstream.write_paused)
            or len(self.body) + len(self.partial or b"") > WRITE_HIGH
            or (self.write_paused and self.state == HEAD and self.partial is not None)
        )
        if wait != self.reading_paused:
            self.reading_paused = wait
            if wait:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    # Waiting.

    def park(self, deadline: float) -> None:
        """Wait for something that is not the client's to bring."""
        self.state = WAIT
        self.deadline = deadline

    def hold(self, agent: Agent, seconds: float) -> None:
        """Keep the request until the agent's row changes, for `seconds`, or the rest of an earlier wait."""
        if self.agent is not None:
            self.settle(self.agent, 0)
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

    # What others ask of a connection.

    def moved(self, remote: bytes) -> None:
        """The client has another address than the one before."""
        self.remote = remote
        self.outgoing_agent = None

    def outward(self) -> tuple[bytes, bytes]:
        """Return scheme and host as the browser knows them."""
        return self.proto, self.request.host

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self.state == HEAD and self.partial is None and not self.write_paused:
            self.finish(clean=True)

    def revoke(self) -> None:
        """The session has ended: whatever is under way for it ends too, but not the sign-out itself."""
        with_portal = self.agent is not None and not self.agent.name
        if self.state in {BODY, ANSWER, WAIT, STREAM} and not with_portal:
            self.transport.abort()
        self.session = None
