"""The event stream of an agent's state (``PREFIX/events``), served by the edge.

A stream costs one entry in the agent's list of watchers, no thread and no task: the feed's changes are written
to the clients as they come.  It is Server-Sent Events (WHATWG HTML, 9.2); a comment each quarter of a minute
keeps it open.
"""

from __future__ import annotations

import json

from dispatcher.proxy.edge.net.client_base import Client
from dispatcher.proxy.edge.net.context import Context
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.settings import EVENTS_PING, MAX_EVENTS
from dispatcher.proxy.edge.routing.table import Agent, Session

_HEAD = (
    b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-store\r\nX-Accel-Buffering: no\r\n"
    b"X-Content-Type-Options: nosniff\r\n"
)


class EventStreams:
    """All streams of a worker."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._streams: dict[Client, Agent] = {}

    def full(self, session: Session) -> bool:
        """Whether a session has reached its limit of streams."""
        return sum(1 for each in session.connections or () if each in self._streams) >= MAX_EVENTS

    def open(self, client: Client, agent: Agent) -> None:
        """Begin a stream."""
        self._streams[client] = agent
        agent.watchers[client] = None
        context = self._context
        lines = context.date_line + context.settings.hsts_line + _HEAD
        self._send(client, pages.head(200, lines, None, close=True) + _event(agent))

    def changed(self, agent: Agent) -> None:
        """Send a change to all watchers of an agent."""
        event = _event(agent)
        for client in list(agent.watchers):
            if not client.write_paused:  # else `resume` sends the state of then
                self._send(client, event)
        if agent.gone:
            for client in list(agent.watchers):
                client.transport.close()

    def resume(self, client: Client) -> None:
        """Send the current state to a client that was too slow for the states in between."""
        self._send(client, _event(self._streams[client]))

    def _send(self, client: Client, data: bytes) -> None:
        client.deadline = self._context.now + EVENTS_PING
        client.transport.write(data)

    def ping(self, client: Client) -> None:
        """Keep a silent stream open."""
        self._send(client, b": \n\n")

    def forget(self, client: Client) -> None:
        """A stream has ended."""
        agent = self._streams.pop(client, None)
        if agent is not None:
            agent.watchers.pop(client, None)

    def close(self) -> None:
        """End all streams; browsers connect again by themselves, to another worker."""
        for client in list(self._streams):
            client.transport.close()


def _event(agent: Agent) -> bytes:
    return b"data: " + json.dumps(agent.public(), ensure_ascii=False).encode() + b"\n\n"
