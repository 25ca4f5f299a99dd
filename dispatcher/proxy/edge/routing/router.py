"""The routing rules of the edge: (request, session, agent) -> decision, without I/O.

1. Ambiguous requests were refused by the parser.  2. The portal's paths go to the portal.  3. A request with a
session or an API token goes to its agent.  4. Without one the edge answers itself and does not read the body.
5. The agent's state decides, never a failed connect: a sleeping agent is woken and the request held for a bounded
time, then browsers get the portal's waiting page and programs a 503.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs, quote_from_bytes

from dispatcher.feed import protocol
from dispatcher.proxy import cookies, origins
from dispatcher.proxy.edge.http import field_names
from dispatcher.proxy.edge.http.request import NO_BODY, SAFE, Request
from dispatcher.proxy.edge.http.response import covers
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.actions import (
    PORTAL,
    Decision,
    Events,
    Hold,
    Lookup,
    Page,
    Pass,
    Redirect,
    Refuse,
    Wake,
)
from dispatcher.proxy.edge.routing.activity import PollDetector
from dispatcher.proxy.edge.routing.settings import MAX_HELD, PORTAL_BODY, Settings
from dispatcher.proxy.edge.routing.table import Agent, Session, Tables

DYING_PAUSE: Final = 0.3  # seconds in which the end of an agent that drops requests is noticed
RUNNING: Final = protocol.RUNNING
_CLEAR_CACHE: Final = b'Clear-Site-Data: "cache"\r\n'
_SESSION_COOKIE: Final = cookies.names(secure=False).session.encode() + b"="  # in `__Host-dispatcher=`, too
_AFTER_PREFIX: Final = frozenset({b"", b"/", b"?"})
_SLEEPY: Final = frozenset({protocol.ASLEEP, protocol.STOPPING})


class _Memory:
    """The router's state for an agent: its requests so far, and the two decisions while it runs."""

    def __init__(self, agent: Agent) -> None:
        self.detector = PollDetector()
        self.poll = Pass(agent, poll=True)
        self.use = Pass(agent, poll=False)


def _memory(agent: Agent) -> _Memory:
    agent.memory = memory = _Memory(agent)
    return memory


class Router:
    """The rules, over the tables of one worker.

    It also counts use: in the agents' rows, and as `used`, the sessions used since the last report.
    """

    def __init__(self, settings: Settings, tables: Tables) -> None:
        self._settings = settings
        self._prefix = settings.prefix
        # Agents' hosts have no sign-in of their own.
        login = (settings.public_origin if settings.subdomain else "") + settings.prefix.decode() + "/login"
        self._unauthenticated = pages.not_signed_in(login)
        self._tables = tables
        self.used: list[Session] = []

    def route(
        self, request: Request, session: Session | None, now: float, scheme: bytes, digest: bytes
    ) -> Decision:
        """Decide on a request that has arrived.

        :param session: a session that has not expired; :param now: on the clock of the tables.
        :param scheme: as seen by the browser.
        :param digest: of a token that the manager may know, empty without one or after a lookup.
        """
        if self._settings.domain and (request.host[-1:] == b"." or b".:" in request.host):
            canonical = self._without_dot(request)
            if canonical is not None:
                return canonical
        prefix = self._prefix
        target = request.target
        size = len(prefix)
        if target[:size] == prefix and target[size : size + 1] in _AFTER_PREFIX:
            return self._to_portal(request, session, digest)
        if session is None:
            refusal = self._no_session(request)
            return Lookup(digest, refusal) if digest else refusal
        self.use(session)
        agent = session.target
        if agent is None or agent.gone:
            agent = self._tables.target(session)
        subdomain = self._settings.subdomain
        if subdomain:
            found = self._by_host(request, session)
            if not isinstance(found, Agent):
                return found
            agent = found
        elif session.host:
            return self._no_session(request)  # made for one host, while agents had hosts of their own
        if agent is None or agent.user_id != session.user_id:
            return Refuse(pages.NO_AGENT)
        if request.watched or not request.traits & SAFE:
            failure = self._origin_fault(request, scheme)
            if failure is not None:
                return Refuse(failure)
        return self._to_agent(request, agent, now)

    def by_token(self, request: Request, token: Session | None, now: float) -> Decision:
        """Decide on a request with an API token: of a program, which gets no page and no redirect.

        A cookie beside the token counts for nothing.  Pages of other sites cannot send the token without asking
        first (CORS), so that the origin of a change does not matter.

        :param token: a token that has not expired, None for another one; :param now: on the clock of the tables.
        """
        if token is None:
            return Refuse(pages.BAD_TOKEN)
        prefix, target = self._prefix, request.target
        if target[: len(prefix)] == prefix and target[len(prefix) : len(prefix) + 1] in _AFTER_PREFIX:
            return Refuse(pages.NOT_FOR_TOKENS)
        if self._settings.subdomain:
            agent = self._of_host(request.host.lower().partition(b":")[0])
            if agent is not None and agent.name not in token.agents:
                agent = None
        else:
            agent = self._tables.target(token)
        if agent is None or agent.user_id != token.user_id:
            return Refuse(pages.NO_AGENT)
        self.use(token)
        return self._to_agent(request, agent, now)

    def _to_agent(self, request: Request, agent: Agent, now: float) -> Decision:
        """Decide on a request that may go to an agent, and count it."""
        memory = agent.memory or _memory(agent)
        if memory.detector.is_poll(request, now):
            agent.traffic.poll += 1
            return memory.poll if agent.state == RUNNING else self._instead(request, agent)
        agent.traffic.use += 1
        if agent.state == RUNNING:
            return memory.use
        then = self._asleep(request, agent)
        return Wake(agent, then) if agent.state in _SLEEPY else then

    def use(self, session: Session) -> None:
        """Note that a session was used."""
        if not session.used:
            session.used = True
            self.used.append(session)

    def to_https(self, request: Request, *, same_port: bool) -> Redirect | Refuse:
        """Redirect a request that came over plain HTTP: 308 keeps method and body (RFC 9110, 15.4.9)."""
        settings = self._settings
        host = request.host.lower()
        name = host.rpartition(b":")[0] if b":" in host.rpartition(b"]")[2] else host
        if settings.subdomain and name.endswith(b"." + settings.domain):
            host = name + settings.public_host[len(settings.domain) :]
        else:
            host = settings.public_host or (host if same_port else name)
        if not host or request.target == b"*":
            return Refuse(pages.bad_request(400, "no Host header"))
        status = 301 if request.method in {b"GET", b"HEAD"} else 308
        return Redirect(b"https://" + host + request.target, status)

    def _without_dot(self, request: Request) -> Redirect | None:
        """Redirect from a host with a dot at its end (RFC 1034, 3.1), which to browsers is another one."""
        settings = self._settings
        name, colon, port = request.host.lower().partition(b":")
        name = name.removesuffix(b".")
        known = name == settings.domain or (settings.subdomain and name.endswith(b"." + settings.domain))
        if not known or request.target == b"*":
            return None
        return Redirect(settings.scheme + b"://" + name + colon + port + request.target, 308)

    # The portal, and requests without a session.

    def _to_portal(self, request: Request, session: Session | None, digest: bytes) -> Decision:
        if request.length > PORTAL_BODY:
            return Refuse(pages.TOO_LARGE)
        request.upgrade = False
        if request.path() == self._settings.events_path:
            return self._to_events(request, session, digest)
        return PORTAL

    def _to_events(self, request: Request, session: Session | None, digest: bytes) -> Decision:
        """Give the same answer for another user's agent as for a missing one."""
        if session is None:
            refusal = Refuse(self._unauthenticated)
            return Lookup(digest, refusal) if digest else refusal
        if request.method != b"GET" or request.length != NO_BODY:
            return Refuse(pages.bad_request(405, "a method other than GET"))
        try:
            query = parse_qs(request.target.partition(b"?")[2].decode("ascii"), max_num_fields=8)
        except ValueError:
            return Refuse(pages.bad_request(400, "a query of too many fields"))
        name = query.get("agent", [session.agent])[0]
        agent = self._tables.agents.get(name)
        if agent is None or name not in session.agents or agent.user_id != session.user_id:
            return Refuse(pages.NO_AGENT)
        return Events(agent)

    def _no_session(self, request: Request) -> Refuse | Redirect:
        """Redirect browsers to the sign-in; answer 401 to programs."""
        settings = self._settings
        if request.bearer:
            return Refuse(pages.BAD_TOKEN)
        if request.upgrade or not request.navigation():
            link = f'<a href="{settings.prefix.decode()}/login">Sign in</a>' if request.wants_html() else ""
            return Refuse(self._unauthenticated, link)
        # A sign-out at the portal cannot clear the cache of an agent's host, nor the session's cookie there.
        ended = settings.subdomain and request.fields.get(field_names.COOKIE, b"").find(_SESSION_COOKIE) >= 0
        location = settings.login + quote_from_bytes(request.target, safe="/").encode("ascii")
        return Redirect(location, lines=_CLEAR_CACHE if ended else b"")

    # Agents that do not run.

    def _asleep(self, request: Request, agent: Agent) -> Hold | Page | Refuse:
        hold = self._settings.hold
        if agent.state == protocol.FAILED or hold <= 0 or len(agent.waiting) >= MAX_HELD:
            return self._instead(request, agent)
        return Hold(agent, hold)

    def _instead(self, request: Request, agent: Agent) -> Page | Refuse:
        """Decide on a request to an agent that is not running."""
        if request.navigation() and not request.length:
            return Page(self._waiting_page(request, agent))
        return Refuse(pages.not_running(agent.public()))

    def _waiting_page(self, original: Request, agent: Agent) -> Request:
        """Return the request for the portal's page about an agent: 503, with the progress of its start."""
        request = Request()
        request.method = original.method
        request.version = original.version
        request.traits = original.traits
        request.target = self._settings.waiting
        request.host = original.host
        request.fields = original.fields
        request.length = NO_BODY
        request.close = original.close
        request.upgrade = request.expects = request.framed = False
        request.bearer = b""
        request.size = original.size
        lines = original.lines.splitlines(keepends=True)
        request.lines = b"".join(
            (
                *(line for line in lines if line.lower().startswith(b"accept:")),
                b"X-Dispatcher-Agent: " + agent.name.encode() + b"\r\n",
                b"X-Dispatcher-Target: " + original.target + b"\r\n",
            )
        )
        return request

    def changed(self, request: Request, session: Session | None, agent: Agent, *, poll: bool) -> Decision:
        """Decide on a held request whose agent's row has changed."""
        if session is None or session.gone:
            return self._no_session(request)
        if agent.gone:
            return Refuse(pages.NO_AGENT)
        if agent.state == RUNNING:
            memory = agent.memory or _memory(agent)
            return memory.poll if poll else memory.use
        if agent.state == protocol.FAILED:
            return self._instead(request, agent)
        return Hold(agent, 0)

    def unreachable(self, agent: Agent, *, held: bool) -> Hold | Refuse:
        """Decide on a request whose agent does not accept connections; it waits for the manager's check.

        :param held: the request has been held before.
        """
        return Hold(agent, self._settings.hold) if self._may_hold(agent, held) else Refuse(pages.UNREACHABLE)

    def dropped(self, agent: Agent, *, held: bool) -> Hold | Refuse:
        """Decide on a safe request that the agent accepted, twice, and dropped without an answer.

        A process that was killed accepts connections for some milliseconds, until the kernel has removed it: the
        request waits for that.
        """
        if not agent.name or agent.gone or not self._may_hold(agent, held):
            return Refuse(pages.GONE_AWAY)
        return Hold(agent, self._settings.hold, DYING_PAUSE)

    def _may_hold(self, agent: Agent, held: bool) -> bool:
        return not held and len(agent.waiting) < MAX_HELD and self._settings.hold > 0

    def waited(self, request: Request, agent: Agent, *, paused: bool) -> Page | Refuse:
        """Decide on a request whose hold is over; `paused`: see `dropped`."""
        if agent.state == RUNNING:
            return Refuse(pages.GONE_AWAY if paused else pages.UNREACHABLE)
        return self._instead(request, agent)

    # Hosts and origins.

    def _by_host(self, request: Request, session: Session) -> Agent | Refuse | Redirect:
        """Return the agent that has the request's host."""
        host = request.host.lower()
        name = host.partition(b":")[0]
        settings = self._settings
        if host == settings.public_host or name == settings.domain:
            return Redirect(settings.prefix + b"/")
        agent = self._of_host(name)
        # A session of another host, or the portal's own, opens nothing here.
        own_host = session.host.encode().lower() == host
        if own_host and agent is not None and agent.name in session.agents:
            return agent
        return Refuse(pages.NO_AGENT) if own_host else self._no_session(request)

    def _of_host(self, name: bytes) -> Agent | None:
        """Return the agent whose host has a name, in lower case."""
        domain = self._settings.domain
        label = name[: -len(domain) - 1] if name.endswith(b"." + domain) else b""
        return self._tables.labels.get(label.decode("ascii", "replace")) if label else None

    def _origin_fault(self, request: Request, scheme: bytes) -> pages.Failure | None:
        """Return why the agent must not see a request: cross-origin, or a service worker above the portal."""
        settings = self._settings
        fields = request.fields
        if not settings.subdomain and field_names.SERVICE_WORKER in fields:
            directory = request.path().rpartition(b"/")[0] + b"/"
            if covers(directory, settings.policy.guarded):
                return pages.SERVICE_WORKER
        if request.traits & SAFE and not request.upgrade:
            return None
        sender = fields.get(field_names.ORIGIN)
        site = fields.get(field_names.SEC_FETCH_SITE, b"")
        here = scheme + b"://" + request.host
        if sender == here:
            return None
        if sender is None and not site:
            # Browsers send one of them.  On a shared origin programs, which no page can attack, need neither.
            return pages.CROSS_ORIGIN if settings.subdomain else None
        own = [origins.origin(here.decode("ascii"))]
        if settings.public_origin and not settings.subdomain:
            own.append(settings.public_origin)
        fault = origins.fault(
            None if sender is None else sender.decode("latin-1").lower(), site.decode("latin-1"), own
        )
        return pages.foreign(*fault) if fault else None
