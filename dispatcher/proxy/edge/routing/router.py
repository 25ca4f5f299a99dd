"""Where a request goes: the five rules of the edge.  Decides and says so to the client connection; does no I/O.

1. what could be read in two ways was refused before it came here (`request`); 2. the portal's paths go to the
portal; 3. a session's request goes to the session's agent; 4. without a session the edge itself answers, and
does not read the body; 5. the agent's state decides, never a failed connect: a sleeping agent is woken and the
request held for a bounded    time, then people get the portal's waiting page and programs a small 503.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes

from dispatcher.feed import protocol
from dispatcher.proxy import cookies
from dispatcher.proxy.edge.http import headers
from dispatcher.proxy.edge.http.request import NO_BODY, SAFE, Request
from dispatcher.proxy.edge.http.response import covers
from dispatcher.proxy.edge.net import body_buffer
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.activity import Rhythm
from dispatcher.proxy.edge.routing.settings import MAX_HELD, PORTAL_BODY

if TYPE_CHECKING:
    from dispatcher.proxy.edge.net.exchange import Exchange
    from dispatcher.proxy.edge.routing.table import Agent, Session

DYING = 0.3  # seconds in which the end of an agent that lets go of requests is noticed
RUNNING = protocol.RUNNING
_TOKEN = re.compile(rb"[\x21-\x7e]{16,256}")
_SLEEPY = frozenset({protocol.ASLEEP, protocol.STOPPING})


def route(client: Exchange, request: Request) -> None:
    """Decide what becomes of a request, and begin it."""
    worker = client.worker
    prefix = worker.settings.prefix
    target = request.target
    if target.startswith(prefix) and target[len(prefix) : len(prefix) + 1] in {b"", b"/", b"?"}:
        _to_portal(client, request)
        return
    cookie = request.fields.get(headers.COOKIE)
    if cookie is not None:
        if cookie != client.cookie:
            read_cookie(client, cookie)
        session = worker.tables.sessions.get(client.digest)
        if session is not None and session.expires > worker.now:
            to_agent(client, request, session)
            return
    _no_session(client, request)


def to_agent(client: Exchange, request: Request, session: Session) -> None:
    """Send a session's request to its agent, if the agent runs."""
    worker = client.worker
    if session is not client.session:
        worker.bind(client, session)
    if not session.used:
        session.used = True
        worker.used.append(session)
    agent = session.target
    if agent is None or agent.gone:
        agent = worker.tables.target(session)
    subdomain = worker.settings.subdomain
    if subdomain:
        agent = _of_host(client, request, session)
        if agent is None:
            return
    elif session.host:
        refuse(client, request)  # made for one host, while agents had hosts of their own
        return
    if agent is None or agent.user != session.user:
        client.say(pages.NO_AGENT)
        return
    if request.watched or subdomain:
        failure = _origin_fault(client, request)
        if failure is not None:
            client.say(failure)
            return
    rhythm = agent.seen
    if rhythm is None:
        rhythm = agent.seen = Rhythm()
    client.poll = poll = rhythm.is_poll(request, worker.now)
    if poll:
        agent.traffic.poll += 1
    else:
        agent.traffic.use += 1
    if agent.state == RUNNING:
        client.dispatch(agent)
    else:
        _asleep(client, request, agent)


# Sessions.


def find_session(client: Exchange, request: Request) -> Session | None:
    """Return the request's session, None when it has none that this worker knows.

    What the Cookie field means is kept with the connection, as browsers send the same one again and again.
    """
    cookie = request.fields.get(headers.COOKIE)
    if cookie is None:
        return None
    if cookie != client.cookie:
        read_cookie(client, cookie)
    worker = client.worker
    session = worker.tables.sessions.get(client.digest)
    if session is None or session.expires <= worker.now:
        return None
    return session


def read_cookie(client: Exchange, cookie: bytes) -> None:
    """Take the dispatcher's cookies out of a Cookie field."""
    token, client.rest_cookie = cookies.split_cookie(cookie, client.worker.settings.cookie_name)
    client.cookie = cookie
    client.digest = hashlib.sha256(token).digest() if token and _TOKEN.fullmatch(token) else b""


def cookie_for(client: Exchange, agent: Agent) -> bytes:
    """Return the Cookie value that an upstream may see: the portal the dispatcher's own, an agent all others."""
    cookie: bytes | None = client.request.fields.get(headers.COOKIE)
    if cookie is None:
        return b""
    if not agent.name:
        return cookie  # doubles too: the portal takes them for none as well, and removes them
    if cookie != client.cookie:
        read_cookie(client, cookie)
    return client.rest_cookie


def _no_session(client: Exchange, request: Request) -> None:
    worker = client.worker
    if request.fields.get(headers.COOKIE) is not None and client.digest:
        if worker.feed_lost_for_good():
            client.say(pages.NO_FEED)
            return
        client.parked_for = 0
        if worker.look_up(client, client.digest):
            return  # `looked_up` goes on
    refuse(client, request)


def looked_up(client: Exchange) -> None:
    """The manager has said whether the session exists, or did not say so in time."""
    request = client.request
    session = find_session(client, request)
    if session is None:
        refuse(client, request)
    elif client.parked_for == EVENTS:
        _events(client, request)
    else:
        to_agent(client, request, session)


def refuse(client: Exchange, request: Request) -> None:
    """Answer a request without a session: people are sent to sign in, programs are told."""
    settings = client.worker.settings
    if request.upgrade or not request.navigation():
        link = ""
        if request.wants_html():
            link = f'<a href="{settings.prefix.decode()}/login">Sign in</a>'
        client.say(pages.BAD_SESSION, link)
        return
    client.redirect(settings.login + quote_from_bytes(request.target, safe="/").encode("ascii"))


# The portal.


EVENTS = 1


def _to_portal(client: Exchange, request: Request) -> None:
    worker = client.worker
    settings = worker.settings
    if request.length > PORTAL_BODY:
        client.say(pages.TOO_LARGE)
        return
    request.upgrade = False
    if request.path() == settings.events_path:
        _events(client, request)
        return
    client.poll = True
    if request.length:
        body_buffer.begin(client, request)
    else:
        client.dispatch(worker.portal)


def _events(client: Exchange, request: Request) -> None:
    """Serve an agent's state as an event stream to its owner."""
    worker = client.worker
    session = find_session(client, request)
    if session is None:
        client.parked_for = EVENTS
        if not (client.digest and request.fields.get(headers.COOKIE) and worker.look_up(client, client.digest)):
            client.say(pages.BAD_SESSION)
        return
    if request.method != b"GET" or request.length != NO_BODY:
        client.say(pages.bad_request(405, "a method other than GET"))
        return
    worker.events.serve(client, request, session)


def to_waiting_page(client: Exchange, agent: Agent) -> None:
    """Let the portal answer in the agent's place: 503, with what is known of the start."""
    worker = client.worker
    original = client.request
    request = Request()
    request.method = original.method
    request.version = original.version
    request.traits = original.traits
    request.target = worker.settings.waiting
    request.host = original.host
    request.fields = original.fields
    request.length = NO_BODY
    request.close = original.close
    request.upgrade = request.expects = False
    request.size = original.size
    request.lines = [
        *(
            line
            for line in original.lines
            if line[:7].lower() == b"accept:" or line[:16].lower() == b"accept-language:"
        ),
        b"X-Dispatcher-Agent: " + agent.name.encode(),
        b"X-Dispatcher-Target: " + original.target,
    ]
    client.request = request
    client.poll = True
    client.dispatch(worker.portal)


# Agents that do not run.


def _asleep(client: Exchange, request: Request, agent: Agent) -> None:
    worker = client.worker
    if agent.state in _SLEEPY and not client.poll:
        worker.wake(agent)
    hold = worker.settings.hold
    if client.poll or agent.state == protocol.FAILED or hold <= 0 or len(agent.waiting) >= MAX_HELD:
        _instead(client, request, agent)
        return
    client.hold(agent, hold)


def _instead(client: Exchange, request: Request, agent: Agent) -> None:
    """Answer for an agent that does not run."""
    if request.navigation() and not request.length:
        to_waiting_page(client, agent)
    else:
        client.say(pages.not_running(agent.public()))


def resumed(client: Exchange, agent: Agent) -> None:
    """The row of an agent that a request is held for has changed."""
    request = client.request
    session = client.session
    if session is None or session.gone:
        refuse(client, request)
    elif agent.gone:
        client.say(pages.NO_AGENT)
    elif agent.state == RUNNING:
        client.dispatch(agent)
    elif agent.state == protocol.FAILED:
        _instead(client, request, agent)
    else:
        client.hold(agent, 0)


def unreachable(client: Exchange, agent: Agent) -> None:
    """Nobody listens at the agent's endpoint: the manager is asked to look, the request waits for what it says."""
    if not agent.name:
        client.say(pages.PORTAL_AWAY)
        return
    worker = client.worker
    worker.report_dead(agent)
    if _may_hold(client, agent):
        client.hold(agent, worker.settings.hold)
    else:
        client.say(pages.UNREACHABLE)


def is_dying(client: Exchange, agent: Agent) -> bool:
    """An agent took a request that changes nothing, twice, and let go without a word: wait whether it is dying.

    A process that was killed goes on taking connections for some milliseconds, until the kernel has put it away.
    False: the request has waited before, or cannot be held.
    """
    worker = client.worker
    if not agent.name or agent.gone or not _may_hold(client, agent):
        return False
    worker.report_dead(agent)
    client.hold(agent, worker.settings.hold)
    client.park(min(client.held_until, worker.now + DYING))
    return True


def _may_hold(client: Exchange, agent: Agent) -> bool:
    """Whether a request may wait for its agent: it has not done so before, and not too many do."""
    return not client.held_until and len(agent.waiting) < MAX_HELD and client.worker.settings.hold > 0


def waited(client: Exchange) -> None:
    """A request has waited long enough."""
    agent = client.holding
    if agent is not None:
        took_it = client.worker.now < client.held_until  # see `is_dying`
        client.release()
        if agent.state == RUNNING:
            client.say(pages.GONE_AWAY if took_it else pages.UNREACHABLE)
        else:
            _instead(client, client.request, agent)
    elif client.agent is None:
        looked_up(client)
    else:
        client.say(pages.TOO_SLOW)


# Hosts and origins.


def _of_host(client: Exchange, request: Request, session: Session) -> Agent | None:
    """Return the agent whose own host was asked for; answer, and return None, where there is none."""
    worker = client.worker
    host = request.host.lower()
    name = host.partition(b":")[0]
    settings = worker.settings
    if host == settings.public_host or name == settings.domain:
        client.redirect(settings.prefix + b"/")
        return None
    label = name[: -len(settings.domain) - 1] if name.endswith(b"." + settings.domain) else b""
    agent = worker.tables.labels.get(label.decode("ascii", "replace")) if label else None
    # A session of another host, or the portal's own, opens nothing here.
    if session.host.encode().lower() != host or agent is None or agent.name not in session.agents:
        if session.host.encode().lower() == host:
            client.say(pages.NO_AGENT)
        else:
            refuse(client, request)
        return None
    return agent


def _origin_fault(client: Exchange, request: Request) -> pages.Failure | None:
    """Return why a request must not reach the agent: it comes from another origin, or would reach the portal's."""
    settings = client.worker.settings
    fields = request.fields
    if not settings.subdomain and headers.SERVICE_WORKER in fields:
        directory = request.path().rpartition(b"/")[0] + b"/"
        if covers(directory, settings.policy.guarded):
            return pages.SERVICE_WORKER
    if not request.upgrade and (request.traits & SAFE or not settings.subdomain):
        return None
    origin = fields.get(headers.ORIGIN)
    if origin is not None:
        scheme, host = client.outward()
        good = origin.lower() == scheme + b"://" + host.lower()
    else:
        # Browsers send Origin with what changes something and with WebSockets; where it is missing, Fetch Metadata
        # may stand for it.  On a shared origin programs, which no page can attack, need neither.
        good = fields.get(headers.SEC_FETCH_SITE) == b"same-origin" or not settings.subdomain
    return None if good else pages.CROSS_ORIGIN
