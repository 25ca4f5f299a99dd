"""What the connections of one worker share: tables, feed, limits, timers and counters.  Touches the loop and the feed.

There is one wheel instead of a timer per request: four times a second it looks at a half of the connections, so a
time-out comes up to half a second late and costs nothing until then.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import secrets
import struct
import termios
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

from dispatcher import feed_protocol
from dispatcher.clock import boottime
from dispatcher.errors import DispatcherError
from dispatcher.logs import logger
from dispatcher.proxy.edge import router
from dispatcher.proxy.edge.access import AccessLog
from dispatcher.proxy.edge.activity import Traffic
from dispatcher.proxy.edge.client import WAIT, Client
from dispatcher.proxy.edge.connect import open_upstream
from dispatcher.proxy.edge.counters import Counters
from dispatcher.proxy.edge.events import EventStreams
from dispatcher.proxy.edge.feed import Feed
from dispatcher.proxy.edge.forwarded import Forwarded, usable_request_id
from dispatcher.proxy.edge.request import Request
from dispatcher.proxy.edge.settings import FRESH_UPSTREAM, IDLE_UPSTREAM, LOOKUP_TIMEOUT, Settings
from dispatcher.proxy.edge.tables import Agent, Changes, Session, Tables
from dispatcher.proxy.edge.tunnel import ClientEnd

_TICK = 0.25
_SPOKES = 2
_MAX_LOOKUPS = 1000  # under way at a time
_MAX_NEGATIVE = 10_000
_NEGATIVE = 5.0  # seconds that an unknown session stays unknown without asking again
_MAX_SPARE = 256  # connection objects kept for the next connections
_WAKE_PAUSE = 1.0  # seconds between two wake requests, or reports, about one agent


class Worker:
    """Shared by all connections of a process."""

    def __init__(self, settings: Settings, feed_path: str, portal_path: str, log: AccessLog) -> None:
        self.settings = settings
        self.loop: asyncio.AbstractEventLoop
        self.now = boottime()
        self.clock = time.monotonic
        self.tables = Tables()
        self.log = log
        self.feed = Feed(feed_path, self._on_message, self._on_up, self._on_down)
        self.portal = Agent("")
        self.portal.update({"state": "running", "endpoint": f"unix:{portal_path}", "uid": os.geteuid()})
        self.portal.traffic = Traffic()
        self.counters = Counters(settings)
        self.events = EventStreams(self)
        self.used: list[Session] = []
        self.draining = False
        self.refused = 0
        self.date_line = b""
        self._spokes: tuple[dict[Client, None], ...] = tuple({} for _ in range(_SPOKES))
        self._next_spoke = 0
        self._ticks = 0
        self._addresses: dict[str, int] = {}
        self._open = 0
        self._spare: list[Client] = []
        self._tunnels: dict[ClientEnd, None] = {}
        self._active: dict[Session, None] = {}
        self._lookups: dict[bytes, list[Client]] = {}
        self._negative: dict[bytes, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported = 0.0
        self._second = 0
        self._request_prefix = secrets.token_hex(5).encode()
        self._request_number = 0
        self._forwarded = Forwarded(settings)
        self._logger = logger("edge")
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin: connect to the feed and turn the wheel."""
        self.loop = loop
        self._date()
        self._reported = self.now
        self.feed.open()
        self._timer = loop.call_later(_TICK, self._tick)

    # Connections.

    def client(self, address: str | None = None) -> Client:
        """Return a protocol for a new connection.

        :param address: of the client, where the transport does not know it.
        """
        client = self._spare.pop() if self._spare else Client(self)
        client.address = address
        return client

    def admit(self, client: Client) -> bool:
        """Take a new connection; False when there are too many."""
        if client.address is None:
            peer = client.transport.get_extra_info("peername")
            client.address = _plain_address(peer[0]) if isinstance(peer, tuple) and peer else ""
        address = client.address
        remote, client.trusted, exempt = self._forwarded.peer(address)
        if remote != client.remote:
            client.moved(remote)
        self._open += 1
        count = self._addresses.get(address, 0) + 1
        self._addresses[address] = count
        self._next_spoke = (self._next_spoke + 1) % _SPOKES
        self._spokes[self._next_spoke][client] = None
        self.counters.connections += 1
        return self._open <= self.settings.connections and (
            exempt or count <= self.settings.connections_per_address
        )

    def forget(self, client: Client, *, streaming: bool) -> None:
        """A connection is gone."""
        self.hand_over(client)
        self._leave(client.address or "")
        if streaming:
            self.events.forget(client)
        if len(self._spare) < _MAX_SPARE:
            client.reset()
            self._spare.append(client)

    def hand_over(self, client: Client) -> None:
        """A connection is no client of HTTP any more; its address still counts."""
        for spoke in self._spokes:
            spoke.pop(client, None)
        session = client.session
        if session is not None:
            client.session = None
            self._unbind(client, session)

    def _leave(self, address: str) -> None:
        self._open -= 1
        left = self._addresses.get(address, 1) - 1
        if left:
            self._addresses[address] = left
        else:
            self._addresses.pop(address, None)

    def remember_tunnel(self, end: ClientEnd) -> None:
        """A connection has become a tunnel."""
        self._tunnels[end] = None
        end.agent.tunnels[end] = None
        session = end.session
        if session is not None:
            self._bind(end, session)
            if session.gone:
                self.soon(end.revoke)

    def forget_tunnel(self, end: ClientEnd) -> None:
        """A tunnel is gone."""
        self._tunnels.pop(end, None)
        end.agent.tunnels.pop(end, None)
        if end.session is not None:
            self._unbind(end, end.session)
        self._leave(end.address)

    def bind(self, client: Client, session: Session) -> None:
        """Remember which session a connection works for, to end it with the session."""
        if client.session is not None:
            self._unbind(client, client.session)
        client.session = session
        self._bind(client, session)

    def _bind(self, connection: Client | ClientEnd, session: Session) -> None:
        if session.connections is None:
            session.connections = {}
            self._active[session] = None
        session.connections[connection] = None

    def _unbind(self, connection: Client | ClientEnd, session: Session) -> None:
        if session.connections is not None:
            session.connections.pop(connection, None)

    # Timers.

    def _tick(self) -> None:
        self._timer = self.loop.call_later(_TICK, self._tick)
        now = self.now = boottime()
        self._ticks += 1
        for client in list(self._spokes[self._ticks % _SPOKES]):
            if client.deadline <= now:
                client.expired()
        if int(now) != self._second:
            self._second = int(now)
            self._each_second(now)

    def _each_second(self, now: float) -> None:
        self._date()
        self.feed.check()
        for session in list(self._active):
            if session.expires <= now:
                self._end(session)
            elif not session.connections:
                session.connections = None
                del self._active[session]
        if now - self._reported >= feed_protocol.ACTIVITY_INTERVAL:
            self.report()
        if self._second % 5 == 0:
            self._tired(now)
            if self.feed_lost_for_good() and self.tables.agents:
                self._logger.error("the manager has been away for too long, nothing is served any more")
                changes = Changes()
                self.tables.clear(changes)
                self._changed(changes)
        self.log.flush()

    def _date(self) -> None:
        self.date_line = b"Date: " + formatdate(usegmt=True).encode("ascii") + b"\r\n"

    def _tired(self, now: float) -> None:
        """Close pooled connections that have been idle for long."""
        for agent in (self.portal, *self.tables.agents.values()):
            idle = agent.idle
            while idle and now - idle[0].since > IDLE_UPSTREAM:
                idle.pop(0).transport.close()
        for digest in [digest for digest, until in self._negative.items() if until <= now]:
            del self._negative[digest]

    def soon(self, callback: Callable[[], object]) -> None:
        """Call back in this turn of the loop or the next."""
        self.loop.call_soon(callback)

    def later(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call back once, for what happens rarely."""
        self.loop.call_later(seconds, callback)

    def watch_writer(self, client: Client) -> None:
        """A client reads too slowly: it must take something before the time-out, or is cut off."""
        client.spoke = _unsent(client)
        client.deadline = self.now + self.settings.body_timeout

    def still_writing(self, client: Client) -> bool:
        """Whether a slow client has taken something since it was last asked; it is asked again later."""
        unsent = _unsent(client)
        if unsent >= client.spoke:
            return False
        client.spoke = unsent
        client.deadline = self.now + self.settings.body_timeout
        return True

    # What a request needs.

    def request_id(self) -> bytes:
        """Return a new id, unique over workers and restarts."""
        self._request_number += 1
        return b"%b%08x" % (self._request_prefix, self._request_number)

    def believe(self, client: Client, request: Request) -> None:
        """Take what a trusted proxy says about its client."""
        client.remote, client.proto, host = self._forwarded.believed(client.address or "", request.fields)
        if host:
            request.host = host
        number = usable_request_id(request.fields)
        if number:
            client.request_id = number

    def fixed_lines(self, client: Client, agent: Agent) -> bytes:
        """Return Host and the edge's own lines: what all requests of a connection to one host have in common."""
        request = client.request
        host = request.host or self.settings.public_host or b"localhost"
        return (
            b"Host: %b\r\nX-Forwarded-For: %b\r\nX-Forwarded-Host: %b\r\nX-Forwarded-Proto: %b\r\n%bVia: 1.%d dispatcher\r\n"
            % (
                host,
                client.remote,
                host,
                client.proto,
                agent.identity if agent.name else b"",
                request.version,
            )
        )

    def connect(self, agent: Agent, client: Client) -> None:
        """Open a connection for a client's request."""
        task = self.loop.create_task(self._connect(agent, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, agent: Agent, client: Client) -> None:
        problem: Exception | None = None
        upstream = None
        try:
            upstream = await open_upstream(self, agent)
        except (OSError, DispatcherError) as error:
            problem = error
        wanted = client.state == WAIT and client.agent is agent and client.upstream is None
        if upstream is not None:
            if wanted:
                client.connected(upstream)
            else:
                upstream.transport.close()
        elif wanted:
            if not isinstance(problem, (ConnectionRefusedError, FileNotFoundError)):
                self._logger.warning("no connection to the agent", agent=agent.name, error=str(problem))
            router.unreachable(client, agent)

    def wake(self, agent: Agent) -> None:
        """Ask the manager to wake an agent; often is as good as once."""
        if self.now - agent.woken >= _WAKE_PAUSE and self.feed.send(
            {"type": feed_protocol.WAKE, "agent": agent.name}
        ):
            agent.woken = self.now
            self.counters.wakes += 1

    def report_dead(self, agent: Agent) -> None:
        """Tell the manager that nobody listens at the agent's endpoint."""
        if self.now - agent.woken >= _WAKE_PAUSE and self.feed.send(
            {"type": feed_protocol.DEAD, "agent": agent.name}
        ):
            agent.woken = self.now

    def look_up(self, client: Client, digest: bytes) -> bool:
        """Ask the manager about a session that is not in the table; False when it is known not to exist."""
        waiting = self._lookups.get(digest)
        if waiting is None:
            if self._negative.get(digest, 0.0) > self.now or len(self._lookups) >= _MAX_LOOKUPS:
                return False
            if not self.feed.complete or not self.feed.send(
                {"type": feed_protocol.LOOKUP, "sha256": digest.hex()}
            ):
                return False
            waiting = self._lookups[digest] = []
            self.later(LOOKUP_TIMEOUT, lambda: self._looked_up(digest))
        waiting.append(client)
        client.parked = digest
        client.park(self.now + LOOKUP_TIMEOUT + 1)
        return True

    def _looked_up(self, digest: bytes) -> None:
        for client in self._lookups.pop(digest, ()):
            if client.parked == digest and client.state == WAIT:
                client.parked = b""
                router.looked_up(client)

    def feed_lost_for_good(self) -> bool:
        """Whether the manager has been away for longer than what is known may be served."""
        return bool(self.feed.lost_at) and self.now - self.feed.lost_at > self.settings.feed_grace

    # What the feed says.

    def _on_message(self, message: dict[str, Any]) -> None:
        self.now = boottime()
        changes = self.tables.apply(message, self.now)
        for agent in changes.agents:
            if agent.traffic is None:
                agent.traffic = Traffic()
        self._changed(changes)
        kind = message["type"]
        if kind == feed_protocol.CHANGE or kind == feed_protocol.SNAPSHOT:
            for row in message.get("sessions", ()) if self._negative or self._lookups else ():
                digest = bytes.fromhex(row["sha256"])
                self._negative.pop(digest, None)
                if digest in self._lookups:
                    self._looked_up(digest)
        elif kind == feed_protocol.SESSION:
            digest = bytes.fromhex(message["sha256"])
            if not message.get("session") and len(self._negative) < _MAX_NEGATIVE:
                self._negative[digest] = self.now + _NEGATIVE
            self._looked_up(digest)

    def _changed(self, changes: Changes) -> None:
        for session in changes.sessions_gone:
            self._end(session)
        for agent in changes.moved:
            idle, agent.idle = agent.idle, []
            for upstream in idle:
                upstream.transport.close()
        for agent in changes.agents:
            for client in list(agent.waiting):
                client.release()
                router.resumed(client, agent)
            for end in list(agent.tunnels) if agent.gone else ():
                end.shut()
            if agent.watchers:
                self.events.changed(agent)

    def _end(self, session: Session) -> None:
        """End everything that is open for a session."""
        connections, session.connections = session.connections, None
        self._active.pop(session, None)
        for connection in connections or ():
            connection.revoke()

    def _on_up(self) -> None:
        self._reported = self.now

    def _on_down(self) -> None:
        """Nobody will answer the lookups under way."""
        for digest in list(self._lookups):
            self._looked_up(digest)

    def report(self) -> None:
        """Tell the manager what was used since the last report, and the totals."""
        now = self.now
        seconds, self._reported = now - self._reported, now
        agents = {}
        for agent in self.tables.agents.values():
            values = agent.traffic.report(seconds, len(agent.tunnels))
            if values:
                agents[agent.name] = values
        used, self.used = self.used, []
        for session in used:
            session.used = False
        if agents or used:
            sessions = [session.digest.hex() for session in used if not session.gone]
            self.feed.send({"type": feed_protocol.ACTIVITY, "agents": agents, "sessions": sessions})
        self.feed.send({"type": feed_protocol.COUNTERS, "values": self.counters.values(self)})

    # Counting.

    def count(self, client: Client, agent: Agent | None, status: int) -> None:
        """Count an exchange that has ended, and log it if that is wanted."""
        self.counters.count(agent, status)
        if self.log.on:
            self.log.write(client, agent, status)

    def log_invalid(self, agent: Agent, request_id: bytes, why: str) -> None:
        """Log an answer that could not be passed on."""
        self.counters.invalid += 1
        self._logger.warning(
            "an answer cannot be passed on", agent=agent.name or "portal", request=request_id.decode(), why=why
        )

    @property
    def open_connections(self) -> int:
        """Connections of clients, tunnels included."""
        return self._open

    @property
    def open_tunnels(self) -> int:
        """WebSockets."""
        return len(self._tunnels)

    # Stopping.

    def drain(self) -> None:
        """Take no new work; what is under way is finished."""
        self.draining = True
        self.events.close()

    def shut_tunnels(self) -> None:
        """Tell all WebSockets that the server goes away."""
        for end in list(self._tunnels):
            end.shut()

    def close_idle(self) -> None:
        """Close connections that are between two requests."""
        for spoke in self._spokes:
            for client in list(spoke):
                client.close_if_idle()

    def close(self) -> None:
        """End what is left."""
        self.report()
        for spoke in self._spokes:
            for client in list(spoke):
                client.transport.abort()
        for end in list(self._tunnels):
            end.transport.abort()
        for agent in (self.portal, *self.tables.agents.values()):
            idle, agent.idle = agent.idle, []
            for upstream in idle:
                upstream.transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self.feed.close()
        self.log.flush()


def _plain_address(text: str) -> str:
    """Return an IPv4 address that was mapped into IPv6 as what it is."""
    if text.startswith("::ffff:"):
        mapped = ipaddress.IPv6Address(text).ipv4_mapped
        return str(mapped) if mapped else text
    return text.partition("%")[0]


def _unsent(client: Client) -> int:
    """Return how many bytes the client has not taken: in memory, and in the kernel's buffer."""
    waiting = client.transport.get_write_buffer_size()
    sock = client.transport.get_extra_info("socket")
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        return waiting + int(struct.unpack("i", answer)[0])
    except (OSError, AttributeError):
        return waiting


__all__ = ["FRESH_UPSTREAM", "Worker"]
