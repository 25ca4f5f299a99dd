"""A worker's connections: who may connect, what belongs to which session, and when something is overdue.

There is one wheel instead of a timer per request: four times a second it looks at a half of the connections, so
a time-out comes up to half a second late and costs nothing until then.  Touches the loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import select
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from dispatcher.common.ip_limits import Tally
from dispatcher.plugin.deadline import boottime
from dispatcher.proxy.edge.http.forwarded import Forwarded
from dispatcher.proxy.edge.net.counters import Counters
from dispatcher.proxy.edge.routing.settings import FAREWELL, LEAST_READ, Settings
from dispatcher.proxy.edge.routing.table import Session

if TYPE_CHECKING:
    from dispatcher.proxy.edge.net.connection import Connection
    from dispatcher.proxy.edge.net.tunnel import ClientEnd

_TICK = 0.25
_SPOKES = 2
_MAX_SPARE = 256  # connection objects kept for the next connections


class Registry:
    """All connections of a worker.

    :ivar now: boot time in seconds, as of the last turn of the wheel; :ivar draining: no new work is taken.
    :ivar beginning: connections that are no clients yet, as their handshake is under way.
    :ivar collected: bytes of bodies for the portal that are not complete yet.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = boottime()
        self.counters = Counters(settings)
        self.draining = False
        self._forwarded = Forwarded(settings)
        self._spokes: tuple[dict[Connection, None], ...] = tuple({} for _ in range(_SPOKES))
        self._next_spoke = 0
        self._ticks = 0
        self._addresses = Tally()
        self._beginning = Tally()
        self.beginning = 0
        self._at_portal = Tally()
        self.collected = 0
        self._open = 0
        self.spare: list[Connection] = []  # for the next connections
        self._tunnels: dict[ClientEnd, None] = {}
        # The last moments of tunnels, the next to come first.
        self._leaving: deque[tuple[float, ClientEnd]] = deque()
        self._active: dict[Session, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0

    def admit(self, client: Connection) -> bool:
        """Take a new connection; False when there are too many."""
        if client.address is None:
            client.address = self.address_of(client.transport)
        address = client.address
        remote, client.trusted, exempt = self._forwarded.peer(address)
        if remote != client.remote:
            client.moved(remote)
        within = self.enter(address, exempt=exempt)
        self._next_spoke = (self._next_spoke + 1) % _SPOKES
        self._spokes[self._next_spoke][client] = None
        self.counters.connections += 1
        return within

    @staticmethod
    def address_of(transport: asyncio.BaseTransport) -> str:
        """Return the peer's address, "" on a Unix socket."""
        peer = transport.get_extra_info("peername")
        return plain_address(peer[0]) if isinstance(peer, tuple) and peer else ""

    def exempt(self, address: str) -> bool:
        """Whether any number of connections may come from an address: this machine's, and trusted proxies'."""
        return self._forwarded.peer(address)[2]

    def enter(self, address: str, *, exempt: bool) -> bool:
        """Count a connection; return whether it is within the bounds.  Either way `leave` it when it is gone."""
        self._open += 1
        count = self._addresses.add(address)
        return self._open <= self.settings.connections and (
            exempt or count <= self.settings.connections_per_address
        )

    def forget(self, client: Connection) -> None:
        """A connection is gone."""
        self.hand_over(client)
        self.leave(client.address or "")
        if len(self.spare) < _MAX_SPARE:
            client.reset()
            self.spare.append(client)

    def hand_over(self, client: Connection) -> None:
        """A connection is no client of HTTP any more; its address still counts."""
        for spoke in self._spokes:
            spoke.pop(client, None)
        session = client.session
        if session is not None:
            client.session = None
            self._unbind(client, session)

    def begin(self, address: str) -> bool:
        """Let a connection begin its handshake; False when too many are at it.  `begun` it when that is over."""
        settings = self.settings
        if self.beginning >= settings.beginning or (
            self._beginning.of(address) >= settings.beginning_per_address and not self.exempt(address)
        ):
            return False
        self.beginning += 1
        self._beginning.add(address)
        return True

    def begun(self, address: str) -> None:
        """A handshake is over: the connection counts as a client now, or is gone."""
        self.beginning -= 1
        self._beginning.drop(address)

    def leave(self, address: str) -> None:
        """A connection of this address is gone."""
        self._open -= 1
        self._addresses.drop(address)

    def enter_portal(self, remote: bytes) -> bool:
        """Take one of the portal's places; False when the client's address has taken half of them already.

        :param remote: where the request comes from, as trusted proxies say.
        """
        address = remote.decode("ascii")
        if self._at_portal.of(address) >= self.settings.portal_share and not self.exempt(address):
            return False
        self._at_portal.add(address)
        return True

    def leave_portal(self, remote: bytes) -> None:
        """Give the place back."""
        self._at_portal.drop(remote.decode("ascii"))

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
        self.leave(end.address)

    def await_farewell(self, end: ClientEnd) -> None:
        """Give a tunnel's client, which was told that this is the end, a moment to take it."""
        self._leaving.append((self.now + FAREWELL, end))

    def bind(self, client: Connection, session: Session) -> None:
        """Remember which session a connection works for, to end it with the session."""
        if client.session is not None:
            self._unbind(client, client.session)
        client.session = session
        self._bind(client, session)

    def _bind(self, connection: Connection | ClientEnd, session: Session) -> None:
        if session.connections is None:
            session.connections = {}
            self._active[session] = None
        session.connections[connection] = None

    def _unbind(self, connection: Connection | ClientEnd, session: Session) -> None:
        if session.connections is not None:
            session.connections.pop(connection, None)

    @property
    def open_connections(self) -> int:
        """Connections of clients, tunnels included."""
        return self._open

    @property
    def open_tunnels(self) -> int:
        """WebSockets."""
        return len(self._tunnels)

    # Time.

    def turn(self) -> None:
        """Turn the wheel, now and then again and again."""
        self._timer = self.loop.call_later(_TICK, self.turn)
        now = self.now = boottime()
        self._ticks += 1
        for client in list(self._spokes[self._ticks % _SPOKES]):
            if client.deadline <= now:
                client.expired()
        leaving = self._leaving
        while leaving and leaving[0][0] <= now:
            leaving.popleft()[1].transport.abort()
        if int(now) != self._second:
            self._second = int(now)
            self.each_second(now)

    def soon(self, callback: Callable[[], object]) -> None:
        """Call back in this turn of the loop or the next."""
        self.loop.call_soon(callback)

    def later(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call back once, for what happens rarely."""
        self.loop.call_later(seconds, callback)

    def watch_writer(self, client: Connection) -> None:
        """A client reads too slowly: it must take something before the time-out, or is cut off."""
        client.spoke = _unsent(client)
        client.deadline = self.now + self.settings.body_timeout

    def still_writing(self, client: Connection) -> bool:
        """Whether a slow client has taken something since it was last asked; it is asked again later."""
        unsent = _unsent(client)
        if unsent > client.spoke - LEAST_READ:
            return False
        client.spoke = unsent
        client.deadline = self.now + self.settings.body_timeout
        return True

    def each_second(self, now: float) -> None:
        """Do what needs no more haste."""
        raise NotImplementedError

    def end_expired(self, now: float) -> None:
        """End what is open for sessions whose time has come; the manager need not be there for that."""
        for session in list(self._active):
            if session.expires <= now:
                self.end(session)
            elif not session.connections:
                session.connections = None
                del self._active[session]

    def end(self, session: Session) -> None:
        """End everything that is open for a session."""
        connections, session.connections = session.connections, None
        self._active.pop(session, None)
        for connection in connections or ():
            connection.revoke()

    # Stopping.

    def shut_tunnels(self) -> None:
        """Tell all WebSockets that the server goes away."""
        for end in list(self._tunnels):
            end.shut()

    def close_idle(self) -> None:
        """Close connections that are between two requests."""
        for spoke in self._spokes:
            for client in list(spoke):
                client.close_if_idle()

    def abort_all(self) -> None:
        """End every connection now."""
        for spoke in self._spokes:
            for client in list(spoke):
                client.transport.abort()
        for end in list(self._tunnels):
            end.transport.abort()
        if self._timer is not None:
            self._timer.cancel()


def plain_address(text: str) -> str:
    """Return an IPv4 address that was mapped into IPv6 as what it is."""
    if text.startswith("::ffff:"):
        mapped = ipaddress.IPv6Address(text).ipv4_mapped
        return str(mapped) if mapped else text
    return text.partition("%")[0]


def was_reset(transport: asyncio.Transport) -> bool:
    """Whether the peer of a connection that is not read any more has refused what was written to it."""
    sock = transport.get_extra_info("socket")
    try:
        poll = select.poll()
        poll.register(sock.fileno(), 0)
        return bool(poll.poll(0))  # an error or a hang-up, which are always told (poll(2))
    except (OSError, ValueError, AttributeError):
        return False


def _unsent(client: Connection) -> int:
    """Return how many bytes the client has not taken: in memory, and in the kernel's buffer."""
    waiting = client.transport.get_write_buffer_size()
    sock = client.transport.get_extra_info("socket")
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        return waiting + int(struct.unpack("i", answer)[0])
    except (OSError, AttributeError):
        return waiting
