"""An upgraded connection: two ends that pass bytes to each other.

Each end takes over its transport from the request's protocol, which is then free: an idle WebSocket costs two
small objects beside the two transports.
"""

from __future__ import annotations

import asyncio
from typing import Final

from dispatcher.proxy.edge.http.websocket import GOING_AWAY, POLICY, Scanner, close_frame
from dispatcher.proxy.edge.net.clients import Clients
from dispatcher.proxy.edge.net.upstream import dense_pause, unread
from dispatcher.proxy.edge.routing.activity import Timers
from dispatcher.proxy.edge.routing.settings import DENSE, LINGER, WRITE_HIGH
from dispatcher.proxy.edge.routing.table import Agent, Session

_SMALL: Final = 256  # bytes of a message that may be a heartbeat
_MAX_SIZES: Final = 16  # of such messages, whose pauses are observed


class End:
    """One end; it forwards the bytes of its peer.

    :ivar other: the other end; :ivar eof: its peer will send no more; :ivar closing: waits for its peer's end.
    :ivar held: not read, because the other end's peer reads too slowly.
    :ivar pausing: not read for a while, see `dense_pause`.
    """

    other: End

    def __init__(self, clients: Clients, transport: asyncio.Transport, agent: Agent) -> None:
        self.clients = clients
        self.transport = transport
        self.agent = agent
        self.scanner = Scanner()
        self.eof = self.closing = self.lost = self.held = self.pausing = False

    def eof_received(self) -> bool:
        """Forward a half-close; after the second one the tunnel ends."""
        self.eof = True
        other = self.other
        if self.closing or other.eof or other.lost or not other.transport.can_write_eof():
            self.end()
            return False
        other.transport.write_eof()
        self.clients.context.loop.call_later(LINGER, self.end)
        return self.transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """One side has closed; close the tunnel."""
        self.lost = True
        other = self.other
        if not other.lost:
            if exc is None:
                other.transport.close()
            else:
                other.transport.abort()

    def end(self) -> None:
        """Close both sides after the buffered bytes."""
        for each in (self, self.other):
            if not each.lost:
                each.transport.close()

    def pause_writing(self) -> None:
        other = self.other
        other.held = True
        if not other.lost:
            other.transport.pause_reading()

    def resume_writing(self) -> None:
        other = self.other
        other.held = False
        if not other.lost and not other.pausing:
            other.transport.resume_reading()

    def _pause(self, size: int) -> None:
        """Do not read for a while after many frames, if they are tiny."""
        context = self.clients.context
        pause = dense_pause(self.agent, size, self.scanner.frames, context.clock())
        if pause and not self.lost:
            self.pausing = True
            self.transport.pause_reading()
            context.loop.call_later(pause, self._end_pause)

    def _end_pause(self) -> None:
        self.pausing = False
        if not self.held and not self.lost and not self.transport.is_closing():
            self.transport.resume_reading()


class ClientEnd(End):
    """The end that faces the web."""

    def __init__(
        self, clients: Clients, transport: asyncio.Transport, agent: Agent, session: Session | None, address: str
    ) -> None:
        super().__init__(clients, transport, agent)
        self.session = session
        self.address = address
        self.timers: Timers | None = None  # with the first small message

    def data_received(self, data: bytes) -> None:
        """Forward the client's bytes; its data frames are use, pings, pongs and a page's heartbeats are not."""
        if self.closing:
            return
        agent = self.agent
        traffic = agent.traffic
        size = len(data)
        traffic.bytes_in += size
        # Most messages are one short masked frame; others go through the scanner.
        scanner = self.scanner
        if 6 < size < 132 and data[1] == size + 122 and scanner.between:
            typed = 0 if data[0] & 0x08 else size
        else:
            typed = scanner.scan(data)
            if scanner.frames >= DENSE:
                self._pause(size)
        if typed and not (size <= _SMALL and self._by_timer(size)):
            context = self.clients.context
            traffic.stream += typed
            if self.session is not None:
                context.router.use(self.session)
            if agent.state != "running":
                context.manager.wake(agent)
        self.other.transport.write(data)

    def _by_timer(self, size: int) -> bool:
        """Whether small messages of this size come at even pauses: heartbeats of the app's page."""
        if self.timers is None:
            self.timers = Timers(_MAX_SIZES)
        return self.timers.by_timer(size, self.clients.context.clock())

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.clients.forget_tunnel(self)

    def revoke(self) -> None:
        """The session has ended."""
        self.shut(POLICY)

    def shut(self, code: int = GOING_AWAY) -> None:
        """Close the WebSocket as far as frames allow: with a Close frame to each side, then the connections."""
        if self.closing or self.lost:
            return
        other = self.other
        self.closing = other.closing = True
        if not other.lost:
            if self.scanner.between and not self.eof:
                other.transport.write(close_frame(GOING_AWAY, masked=True))
            other.transport.close()
        if not other.scanner.between or other.eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.resume_reading()
        self.transport.write(close_frame(code, masked=False))
        self.transport.write_eof()
        self.clients.abort_soon(self)


class UpstreamEnd(End):
    """The end that faces the agent."""

    def data_received(self, data: bytes) -> None:
        """Forward the agent's bytes; above `TRICKLE` they are use."""
        if self.closing:
            return
        traffic = self.agent.traffic
        size = len(data)
        traffic.bytes_out += size
        traffic.bulk += size
        scanner = self.scanner
        if not 1 < size < 128 or data[1] != size - 2 or not scanner.between:
            scanner.scan(data)
            if scanner.frames >= DENSE:
                self._pause(size)
        self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the agent's last bytes on: a Close frame with the reason, perhaps."""
        if exc is not None and not self.other.lost:
            last = b"".join(unread(self.transport))
            if last and not self.closing:
                self.data_received(last)
                if self.scanner.between:
                    exc = None
        super().connection_lost(exc)


def tunnel(client: ClientEnd, upstream: UpstreamEnd, head: bytes, first: bytes, early: bytes) -> None:
    """Join two ends.  Paused reading stays paused: a side that does not read holds the other back.

    :param head: the 101 for the client; :param first: bytes of the agent after it.
    :param early: bytes of the client before it had the answer.
    """
    client.other, upstream.other = upstream, client
    client.clients.remember_tunnel(client)
    client.transport.set_protocol(client)  # type: ignore[arg-type]
    upstream.transport.set_protocol(upstream)  # type: ignore[arg-type]
    upstream.transport.set_write_buffer_limits(WRITE_HIGH)
    client.transport.write(head)
    if first:
        upstream.data_received(first)
    if early:
        client.data_received(early)
    if client.eof:
        client.eof_received()
