"""The event stream of an agent's state (``PREFIX/events``), served by the edge.  Touches client connections.

A stream costs one entry in the agent's list of watchers, no thread and no task: the feed's changes are written
to the clients as they come.  It is Server-Sent Events (WHATWG HTML, 9.2); a comment each quarter of a minute
keeps it open.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from dispatcher.proxy.edge.net.connection import STREAM, Connection
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.settings import EVENTS_PING, MAX_EVENTS

if TYPE_CHECKING:
    from dispatcher.proxy.edge.http.request import Request
    from dispatcher.proxy.edge.routing.table import Agent, Session
    from dispatcher.proxy.edge.worker import Worker

_HEAD = (
    b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-store\r\nX-Accel-Buffering: no\r\n"
    b"X-Content-Type-Options: nosniff\r\n"
)


class EventStreams:
    """All streams of a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._streams: dict[Connection, Agent] = {}

    def serve(self, client: Connection, request: Request, session: Session) -> None:
        """Begin a stream, or say why not; alike for another's agent and for none at all."""
        worker = self._worker
        try:
            query = parse_qs(request.target.partition(b"?")[2].decode("ascii"), max_num_fields=8)
        except ValueError:
            client.say(pages.bad_request(400, "a query of too many fields"))
            return
        name = query.get("agent", [session.agent])[0]
        agent = worker.tables.agents.get(name)
        if agent is None or name not in session.agents or agent.user != session.user:
            client.say(pages.NO_AGENT)
            return
        connections = session.connections or {}
        if sum(1 for each in connections if each in self._streams) >= MAX_EVENTS:
            client.say(pages.TOO_BUSY)
            return
        worker.bind(client, session)
        client.state = STREAM
        client.deadline = worker.now + EVENTS_PING
        client.closing = True
        self._streams[client] = agent
        agent.watchers[client] = None
        lines = worker.date_line + worker.settings.hsts_line + _HEAD
        client.transport.write(pages.head(200, lines, None, close=True) + _event(agent))

    def changed(self, agent: Agent) -> None:
        """Tell all who watch an agent."""
        event = _event(agent)
        for client in list(agent.watchers):
            if client.write_paused:
                continue  # the next state makes this one uninteresting
            self._send(client, event)
        if agent.gone:
            for client in list(agent.watchers):
                client.transport.close()

    def resume(self, client: Connection) -> None:
        """A client that read too slowly for the states in between gets the present one."""
        self._send(client, _event(self._streams[client]))

    def _send(self, client: Connection, data: bytes) -> None:
        client.transport.write(data)
        client.deadline = self._worker.now + EVENTS_PING

    def ping(self, client: Connection) -> None:
        """Keep a silent stream open."""
        if client.write_paused:
            client.transport.abort()
        else:
            self._send(client, b": \n\n")

    def forget(self, client: Connection) -> None:
        """A stream is gone."""
        agent = self._streams.pop(client, None)
        if agent is not None:
            agent.watchers.pop(client, None)
            self._worker.count(client, None, 200)

    def close(self) -> None:
        """End all streams; browsers come back by themselves, to another worker."""
        for client in list(self._streams):
            client.transport.close()


def _event(agent: Agent) -> bytes:
    return b"data: " + json.dumps(agent.public(), ensure_ascii=False).encode() + b"\n\n"
