"""A worker: the tables that the manager's feed fills, and the connections that are served from them."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from typing import Any

from dispatcher.feed import protocol
from dispatcher.plugin.deadline import boottime
from dispatcher.proxy.edge.feed_client import Feed
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.net.clients import TICK, Clients
from dispatcher.proxy.edge.net.connect import Connector
from dispatcher.proxy.edge.net.connection import Connection
from dispatcher.proxy.edge.net.context import Context
from dispatcher.proxy.edge.net.event_streams import EventStreams
from dispatcher.proxy.edge.net.upstream import Receiver
from dispatcher.proxy.edge.routing.settings import IDLE_UPSTREAM, LOOKUP_TIMEOUT, Settings
from dispatcher.proxy.edge.routing.table import Agent, Changes

_MAX_LOOKUPS = 1000  # under way at a time
_MAX_NEGATIVE = 10_000
_NEGATIVE_TTL = 5.0  # seconds for which an unknown session is not looked up again
_WAKE_PAUSE = 1.0  # seconds between two wake requests, or reports, about one agent


class Worker:
    """The parts of a worker, joined; as `context.Manager` its link to the manager."""

    def __init__(self, settings: Settings, feed_path: str, portal_path: str, log: AccessLog) -> None:
        self.context = context = Context(settings, portal_path, log)
        self._connector = Connector(context)
        context.connect = self._connector.connect
        context.manager = self
        self.events = EventStreams(context)
        self.clients = Clients(context, lambda: Connection(self.clients, self.events))
        self.feed = Feed(feed_path, self._on_message, self._on_up, self._on_down)
        self._lookups: dict[bytes, list[Receiver]] = {}
        self._negative: dict[bytes, float] = {}
        self._reported = context.now
        self._second = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Connect to the feed and start the timer wheel."""
        self.context.loop = loop
        self.feed.open()
        self._turn()

    def _turn(self) -> None:
        context = self.context
        self._timer = context.loop.call_later(TICK, self._turn)
        now = context.now = boottime()
        self.clients.turn()
        if int(now) != self._second:
            self._second = int(now)
            context.date_line = b"Date: " + formatdate(usegmt=True).encode("ascii") + b"\r\n"
            self._each_second(now)

    def _each_second(self, now: float) -> None:
        self.feed.check()
        self.clients.end_expired(now)
        if now - self._reported >= protocol.ACTIVITY_INTERVAL:
            self.report()
        if int(now) % 5 == 0:
            self._close_idle_upstreams(now)
            if self.lost_for_good() and self.context.tables.agents:
                self.context.logger.error(
                    "the manager is unreachable for longer than proxy.feed_grace, every request gets 503"
                )
                changes = Changes()
                self.context.tables.clear(changes)
                self._apply(changes)
        self.context.log.flush()

    def _close_idle_upstreams(self, now: float) -> None:
        for agent in (self.context.portal, *self.context.tables.agents.values()):
            idle = agent.idle
            while idle and now - idle[0].since > IDLE_UPSTREAM:
                idle.pop(0).transport.close()
        for digest in [digest for digest, until in self._negative.items() if until <= now]:
            del self._negative[digest]

    def wake(self, agent: Agent) -> None:
        """Ask the manager to wake an agent, at most once a second."""
        if self._notify(protocol.WAKE, agent):
            self.context.counters.wakes += 1

    def report_dead(self, agent: Agent) -> None:
        """Report to the manager that nothing listens at the agent's endpoint."""
        self._notify(protocol.DEAD, agent)

    def _notify(self, kind: str, agent: Agent) -> bool:
        now = self.context.now
        if now - agent.woken < _WAKE_PAUSE or not self.feed.send({"type": kind, "agent": agent.name}):
            return False
        agent.woken = now
        return True

    def look_up(self, exchange: Receiver, digest: bytes) -> bool:
        """Ask the manager about a session that is not in the table; False when it is known not to exist."""
        waiting = self._lookups.get(digest)
        if waiting is None:
            if self._negative.get(digest, 0.0) > self.context.now or len(self._lookups) >= _MAX_LOOKUPS:
                return False
            if not self.feed.complete or not self.feed.send({"type": protocol.LOOKUP, "sha256": digest.hex()}):
                return False
            waiting = self._lookups[digest] = []
            self.context.loop.call_later(LOOKUP_TIMEOUT, lambda: self._looked_up(digest))
        waiting.append(exchange)
        return True

    def _looked_up(self, digest: bytes) -> None:
        for exchange in self._lookups.pop(digest, ()):
            exchange.looked_up(digest)

    def lost_for_good(self) -> bool:
        """Whether the feed has been lost for longer than `feed_grace`."""
        return bool(self.feed.lost_at) and self.context.now - self.feed.lost_at > self.context.settings.feed_grace

    def _on_message(self, message: dict[str, Any]) -> None:
        self.context.now = boottime()
        changes = self.context.tables.apply(message, self.context.now)
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
                self._negative[digest] = self.context.now + _NEGATIVE_TTL
            self._looked_up(digest)

    def _apply(self, changes: Changes) -> None:
        for session in changes.sessions_gone:
            self.clients.end(session)
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
        self._reported = self.context.now

    def _on_down(self) -> None:
        """End the lookups in progress: no answers will arrive."""
        for digest in list(self._lookups):
            self._looked_up(digest)

    def report(self) -> None:
        """Report the use since the last report, and the totals."""
        now = self.context.now
        seconds, self._reported = now - self._reported, now
        self.clients.count_use()
        agents = {}
        for agent in self.context.tables.agents.values():
            values = agent.traffic.report(seconds, len(agent.tunnels))
            if values:
                agents[agent.name] = values
                for end in agent.tunnels if values.get("stream") else ():
                    if end.session is not None:
                        self.context.router.use(end.session)
        used, self.context.router.used = self.context.router.used, []
        for session in used:
            session.used = False
        if agents or used:
            sessions = [session.digest.hex() for session in used if not session.gone and not session.bearer]
            tokens = [session.digest.hex() for session in used if not session.gone and session.bearer]
            self.feed.send({"type": protocol.ACTIVITY, "agents": agents, "sessions": sessions, "tokens": tokens})
        totals = {
            "connections_open": self.clients.open,
            "websockets_open": len(self.clients.tunnels),
            "log_lines_lost_total": self.context.log.lost,
            **self.context.counters.values(),
        }
        self.feed.send({"type": protocol.COUNTERS, "values": totals})

    def drain(self) -> None:
        """Accept no new work; finish work in progress."""
        self.context.draining = True
        self.events.close()

    def close(self) -> None:
        """End all connections."""
        self.report()
        if self._timer is not None:
            self._timer.cancel()
        self.clients.abort_all()
        for agent in (self.context.portal, *self.context.tables.agents.values()):
            idle, agent.idle = agent.idle, []
            for upstream in idle:
                upstream.transport.abort()
        for task in self._connector.tasks:
            task.cancel()
        self.feed.close()
        self.context.log.flush()
