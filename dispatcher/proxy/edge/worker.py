"""What a worker's connections share: tables, feed, upstreams and counters.  Touches the loop and the feed."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from email.utils import formatdate
from typing import Any

from dispatcher.common.log import logger
from dispatcher.feed import protocol
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import DispatcherError
from dispatcher.proxy.edge.feed_client import Feed
from dispatcher.proxy.edge.http.forwarded import usable_request_id
from dispatcher.proxy.edge.http.request import Request
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.net.client import Client
from dispatcher.proxy.edge.net.connect import open_upstream
from dispatcher.proxy.edge.net.connection import WAIT, Connection
from dispatcher.proxy.edge.net.events import EventStreams
from dispatcher.proxy.edge.net.exchange import Exchange
from dispatcher.proxy.edge.net.registry import Registry
from dispatcher.proxy.edge.routing import router
from dispatcher.proxy.edge.routing.activity import Traffic
from dispatcher.proxy.edge.routing.settings import IDLE_UPSTREAM, LOOKUP_TIMEOUT, Settings
from dispatcher.proxy.edge.routing.table import Agent, Changes, Session, Tables

_MAX_LOOKUPS = 1000  # under way at a time
_MAX_NEGATIVE = 10_000
_NEGATIVE = 5.0  # seconds that an unknown session stays unknown without asking again
_WAKE_PAUSE = 1.0  # seconds between two wake requests, or reports, about one agent


class Worker(Registry):
    """Shared by all connections of a process.

    :ivar used: sessions that made a request since the last report; :ivar refused: requests that were no HTTP.
    """

    def __init__(self, settings: Settings, feed_path: str, portal_path: str, log: AccessLog) -> None:
        super().__init__(settings)
        self.clock = time.monotonic
        self.tables = Tables()
        self.log = log
        self.events = EventStreams(self)
        self.feed = Feed(feed_path, self._on_message, self._on_up, self._on_down)
        self.portal = Agent("")
        self.portal.update({"state": "running", "endpoint": f"unix:{portal_path}", "uid": os.geteuid()})
        self.portal.traffic = Traffic()
        self.used: list[Session] = []
        self.refused = 0
        self.date_line = b""
        self._lookups: dict[bytes, list[Exchange]] = {}
        self._negative: dict[bytes, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported = 0.0
        self.request_prefix = secrets.token_hex(5).encode()
        self.serial = 0
        self._logger = logger("edge")

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin: connect to the feed and turn the wheel."""
        self.loop = loop
        self._date()
        self._reported = self.now
        self.feed.open()
        self.turn()

    def client(self, address: str | None = None) -> Connection:
        """Return a protocol for a new connection.

        :param address: of the client, where the transport does not know it.
        """
        client = self.spare.pop() if self.spare else Client(self)
        client.address = address
        return client

    def each_second(self, now: float) -> None:
        self._date()
        self.feed.check()
        self.end_expired(now)
        if now - self._reported >= protocol.ACTIVITY_INTERVAL:
            self.report()
        if int(now) % 5 == 0:
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

    def request_id(self) -> bytes:
        """Return a new id, unique over workers and restarts."""
        self.serial += 1
        return b"%b%08x" % (self.request_prefix, self.serial)

    def believe(self, client: Connection, request: Request) -> None:
        """Take what a trusted proxy says about its client."""
        client.remote, client.proto, host = self._forwarded.believed(client.address or "", request.fields)
        if host:
            request.host = host
        number = usable_request_id(request.fields)
        if number:
            client.request_id = number

    def fixed_lines(self, client: Connection, agent: Agent) -> bytes:
        """Return Host and the edge's own lines: what all requests of a connection to one host have in common."""
        request = client.request
        host = request.host or self.settings.public_host or b"localhost"
        return (
            b"Host: %b\r\nX-Forwarded-For: %b\r\nX-Forwarded-Host: %b\r\nX-Forwarded-Proto: %b\r\n"
            b"%bVia: 1.%d dispatcher\r\n"
            % (
                host,
                client.remote,
                host,
                client.proto,
                agent.identity if agent.name else b"",
                request.version,
            )
        )

    def connect(self, agent: Agent, client: Exchange) -> None:
        """Open a connection for a client's request."""
        task = self.loop.create_task(self._connect(agent, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, agent: Agent, client: Exchange) -> None:
        problem: Exception | None = None
        upstream = None
        try:
            upstream = await open_upstream(self, agent)
        except (OSError, DispatcherError) as error:
            problem = error
        if upstream is not None and upstream.transport.is_closing():
            # Whoever accepted it ended before it could be used: nobody has been told of the request.
            problem, upstream = ConnectionRefusedError("closed as soon as it was open"), None
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
        if self.now - agent.woken >= _WAKE_PAUSE and self.feed.send({"type": protocol.WAKE, "agent": agent.name}):
            agent.woken = self.now
            self.counters.wakes += 1

    def report_dead(self, agent: Agent) -> None:
        """Tell the manager that nobody listens at the agent's endpoint."""
        if self.now - agent.woken >= _WAKE_PAUSE and self.feed.send({"type": protocol.DEAD, "agent": agent.name}):
            agent.woken = self.now

    def look_up(self, client: Exchange, digest: bytes) -> bool:
        """Ask the manager about a session that is not in the table; False when it is known not to exist."""
        waiting = self._lookups.get(digest)
        if waiting is None:
            if self._negative.get(digest, 0.0) > self.now or len(self._lookups) >= _MAX_LOOKUPS:
                return False
            if not self.feed.complete or not self.feed.send({"type": protocol.LOOKUP, "sha256": digest.hex()}):
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

    def _on_message(self, message: dict[str, Any]) -> None:
        self.now = boottime()
        changes = self.tables.apply(message, self.now)
        for agent in changes.agents:
            if agent.traffic is None:
                agent.traffic = Traffic()
        self._changed(changes)
        kind = message["type"]
        if kind in {protocol.CHANGE, protocol.SNAPSHOT}:
            for row in message.get("sessions", ()) if self._negative or self._lookups else ():
                digest = bytes.fromhex(row["sha256"])
                self._negative.pop(digest, None)
                if digest in self._lookups:
                    self._looked_up(digest)
        elif kind == protocol.SYNC:
            self.feed.send({"type": protocol.SYNCED, "number": message["number"]})
        elif kind == protocol.SESSION:
            digest = bytes.fromhex(message["sha256"])
            if not message.get("session") and len(self._negative) < _MAX_NEGATIVE:
                self._negative[digest] = self.now + _NEGATIVE
            self._looked_up(digest)

    def _changed(self, changes: Changes) -> None:
        for session in changes.sessions_gone:
            self.end(session)
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
            self.feed.send({"type": protocol.ACTIVITY, "agents": agents, "sessions": sessions})
        self.feed.send({"type": protocol.COUNTERS, "values": self.counters.values(self)})

    def count(self, client: Connection, agent: Agent | None, status: int) -> None:
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

    def drain(self) -> None:
        """Take no new work; what is under way is finished."""
        self.draining = True
        self.events.close()

    def close(self) -> None:
        """End what is left."""
        self.report()
        self.abort_all()
        for agent in (self.portal, *self.tables.agents.values()):
            idle, agent.idle = agent.idle, []
            for upstream in idle:
                upstream.transport.abort()
        for task in self._tasks:
            task.cancel()
        self.feed.close()
        self.log.flush()
