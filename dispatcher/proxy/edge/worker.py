"""A worker: the tables that the manager's feed fills, and the connections that are served from them."""

from __future__ import annotations

import asyncio
from typing import Any

from dispatcher.feed import protocol
from dispatcher.plugin.deadline import boottime
from dispatcher.proxy.edge.feed_client import Feed
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.net.connection import Connection
from dispatcher.proxy.edge.net.services import Services, Waiting
from dispatcher.proxy.edge.routing.activity import Traffic
from dispatcher.proxy.edge.routing.settings import IDLE_UPSTREAM, LOOKUP_TIMEOUT, Settings
from dispatcher.proxy.edge.routing.table import Agent, Changes

_MAX_LOOKUPS = 1000  # under way at a time
_MAX_NEGATIVE = 10_000
_NEGATIVE_TTL = 5.0  # seconds for which an unknown session is not looked up again
_WAKE_PAUSE = 1.0  # seconds between two wake requests, or reports, about one agent


class Worker(Services):
    """Shared by all connections of a process."""

    def __init__(self, settings: Settings, feed_path: str, portal_path: str, log: AccessLog) -> None:
        super().__init__(settings, portal_path, log)
        self.feed = Feed(feed_path, self._on_message, self._on_up, self._on_down)
        self._lookups: dict[bytes, list[Waiting]] = {}
        self._negative: dict[bytes, float] = {}
        self._reported = 0.0

    def _new_client(self) -> Connection:
        return Connection(self)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Connect to the feed and start the timer wheel."""
        self.loop = loop
        self._reported = self.now
        self.feed.open()
        self.turn()

    def each_second(self, now: float) -> None:
        self.feed.check()
        self.end_expired(now)
        if now - self._reported >= protocol.ACTIVITY_INTERVAL:
            self.report()
        if int(now) % 5 == 0:
            self._close_idle_upstreams(now)
            if self.feed_lost_for_good() and self.tables.agents:
                self._logger.error(
                    "the manager is unreachable for longer than proxy.feed_grace, every request gets 503"
                )
                changes = Changes()
                self.tables.clear(changes)
                self._apply(changes)
        self.log.flush()

    def _close_idle_upstreams(self, now: float) -> None:
        for agent in (self.portal, *self.tables.agents.values()):
            idle = agent.idle
            while idle and now - idle[0].since > IDLE_UPSTREAM:
                idle.pop(0).transport.close()
        for digest in [digest for digest, until in self._negative.items() if until <= now]:
            del self._negative[digest]

    def wake(self, agent: Agent) -> None:
        """Ask the manager to wake an agent, at most once a second."""
        if self.now - agent.woken >= _WAKE_PAUSE and self.feed.send({"type": protocol.WAKE, "agent": agent.name}):
            agent.woken = self.now
            self.counters.wakes += 1

    def report_dead(self, agent: Agent) -> None:
        """Report to the manager that nothing listens at the agent's endpoint."""
        if self.now - agent.woken >= _WAKE_PAUSE and self.feed.send({"type": protocol.DEAD, "agent": agent.name}):
            agent.woken = self.now

    def look_up(self, client: Waiting, digest: bytes) -> bool:
        """Ask the manager about a session that is not in the table; False when it is known not to exist."""
        waiting = self._lookups.get(digest)
        if waiting is None:
            if self._negative.get(digest, 0.0) > self.now or len(self._lookups) >= _MAX_LOOKUPS:
                return False
            if not self.feed.complete or not self.feed.send({"type": protocol.LOOKUP, "sha256": digest.hex()}):
                return False
            waiting = self._lookups[digest] = []
            self.loop.call_later(LOOKUP_TIMEOUT, lambda: self._looked_up(digest))
        waiting.append(client)
        return True

    def _looked_up(self, digest: bytes) -> None:
        for client in self._lookups.pop(digest, ()):
            client.looked_up(digest)

    def feed_lost_for_good(self) -> bool:
        """Whether the feed has been lost for longer than `feed_grace`."""
        return bool(self.feed.lost_at) and self.now - self.feed.lost_at > self.settings.feed_grace

    def _on_message(self, message: dict[str, Any]) -> None:
        self.now = boottime()
        changes = self.tables.apply(message, self.now)
        for agent in changes.agents:
            if agent.traffic is None:
                agent.traffic = Traffic()
        self._apply(changes)
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
                self._negative[digest] = self.now + _NEGATIVE_TTL
            self._looked_up(digest)

    def _apply(self, changes: Changes) -> None:
        for session in changes.sessions_gone:
            self.end(session)
        for agent in changes.moved:
            idle, agent.idle = agent.idle, []
            for upstream in idle:
                upstream.transport.close()
        for agent in changes.agents:
            for client in list(agent.waiting):
                client.agent_changed(agent)
            for end in list(agent.tunnels) if agent.gone else ():
                end.shut()
            if agent.watchers:
                self.events.changed(agent)

    def _on_up(self) -> None:
        self._reported = self.now

    def _on_down(self) -> None:
        """End the lookups in progress: no answers will arrive."""
        for digest in list(self._lookups):
            self._looked_up(digest)

    def report(self) -> None:
        """Report the use since the last report, and the totals."""
        now = self.now
        seconds, self._reported = now - self._reported, now
        agents = {}
        for agent in self.tables.agents.values():
            values = agent.traffic.report(seconds, len(agent.tunnels))
            if values:
                agents[agent.name] = values
        used, self.router.used = self.router.used, []
        for session in used:
            session.used = False
        if agents or used:
            sessions = [session.digest.hex() for session in used if not session.gone]
            self.feed.send({"type": protocol.ACTIVITY, "agents": agents, "sessions": sessions})
        totals = {
            "connections_open": self.open_connections,
            "websockets_open": self.open_tunnels,
            "log_lines_lost_total": self.log.lost,
            **self.counters.values(),
        }
        self.feed.send({"type": protocol.COUNTERS, "values": totals})

    def drain(self) -> None:
        """Accept no new work; finish work in progress."""
        self.draining = True
        self.events.close()

    def close(self) -> None:
        """End all connections."""
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
