"""A worker's connections: admission, the connections of each session, and time-outs.

A timer wheel serves in place of a timer per request: four times a second it checks a half of the connections, so a
time-out comes up to half a second late and costs nothing until then.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Protocol

from dispatcher.common.ip_limits import Tally
from dispatcher.proxy.edge.http.trusted_proxies import TrustedProxies
from dispatcher.proxy.edge.net.client_base import Client
from dispatcher.proxy.edge.net.context import Context
from dispatcher.proxy.edge.routing.settings import CLOSE_TIMEOUT, LEAST_READ
from dispatcher.proxy.edge.routing.table import Agent, Session

TICK = 0.25
_SLOTS = 2
_MAX_SPARE = 256  # connection objects kept for the next connections


class Tunnel(Protocol):
    """The client's end of a tunnel; `tunnel.ClientEnd` describes the members."""

    address: str
    agent: Agent
    session: Session | None
    transport: asyncio.Transport

    def revoke(self) -> None: ...
    def shut(self) -> None: ...


class Clients:
    """The clients' connections of a worker.

    :ivar handshakes: connections with a handshake in progress; :ivar open: connections, tunnels included.
    :ivar spare: objects for the next connections; :ivar tunnels: the clients' ends of all WebSockets.
    """

    def __init__(self, context: Context, make_client: Callable[[], Client]) -> None:
        self.context = context
        self._make_client = make_client
        settings = context.settings
        self.proxies = TrustedProxies(settings.trusted, unix=settings.trusted_unix, scheme=settings.scheme)
        self._wheel: tuple[dict[Client, None], ...] = tuple({} for _ in range(_SLOTS))
        self._next_slot = 0
        self._ticks = 0
        self._addresses = Tally()
        self._handshakes = Tally()
        self.handshakes = 0
        self._portal_slots = Tally()
        self.open = 0
        self.spare: list[Client] = []
        self.tunnels: dict[Tunnel, None] = {}
        # Closing tunnels and the times of their abort, earliest first.
        self._closing: deque[tuple[float, Tunnel]] = deque()
        self._active: dict[Session, None] = {}

    def client(self, address: str | None = None) -> Client:
        """Return a protocol for a new connection.

        :param address: of the client, where the transport does not know it.
        """
        client = self.spare.pop() if self.spare else self._make_client()
        client.address = address
        return client

    def admit(self, client: Client) -> bool:
        """Admit a new connection; False if there are too many."""
        if client.address is None:
            client.address = self.address_of(client.transport)
        address = client.address
        remote, trusted, exempt = self.proxies.peer(address)
        client.remote, client.trusted = remote, trusted
        within = self.opened(address, exempt=exempt)
        self._next_slot = (self._next_slot + 1) % _SLOTS
        self._wheel[self._next_slot][client] = None
        self.context.counters.connections += 1
        return within

    @staticmethod
    def address_of(transport: asyncio.BaseTransport) -> str:
        """Return the peer's address, "" on a Unix socket."""
        peer = transport.get_extra_info("peername")
        return plain_address(peer[0]) if isinstance(peer, tuple) and peer else ""

    def exempt(self, address: str) -> bool:
        """Whether the limits do not apply to an address: this machine's, and those of trusted proxies."""
        return self.proxies.peer(address)[2]

    def opened(self, address: str, *, exempt: bool) -> bool:
        """Count a connection; return whether it is within the limits.  Either way call `closed` at its end."""
        self.open += 1
        count = self._addresses.add(address)
        return self.open <= self.context.settings.connections and (
            exempt or count <= self.context.settings.connections_per_address
        )

    def forget(self, client: Client) -> None:
        """A connection has ended."""
        self.hand_over(client)
        self.closed(client.address or "")
        if len(self.spare) < _MAX_SPARE:
            client.reset()
            self.spare.append(client)

    def hand_over(self, client: Client) -> None:
        """A connection no longer serves HTTP; its address still counts."""
        for slot in self._wheel:
            slot.pop(client, None)
        session = client.session
        if session is not None:
            client.session = None
            self._unbind(client, session)

    def start_handshake(self, address: str) -> bool:
        """Let a connection begin its handshake; False when too many do.  Call `end_handshake` when it is over."""
        settings = self.context.settings
        if self.handshakes >= settings.handshakes or (
            self._handshakes.of(address) >= settings.handshakes_per_address and not self.exempt(address)
        ):
            return False
        self.handshakes += 1
        self._handshakes.add(address)
        return True

    def end_handshake(self, address: str) -> None:
        """A handshake has ended: the connection counts as a client now, or is closed."""
        self.handshakes -= 1
        self._handshakes.drop(address)

    def closed(self, address: str) -> None:
        """A connection of this address has ended."""
        self.open -= 1
        self._addresses.drop(address)

    def take_portal_slot(self, remote: bytes) -> bool:
        """Take one of the portal's slots; False if the client's address has half of them already.

        :param remote: the client's address as reported by trusted proxies.
        """
        address = remote.decode("ascii")
        if self._portal_slots.of(address) >= self.context.settings.portal_share and not self.exempt(address):
            return False
        self._portal_slots.add(address)
        return True

    def free_portal_slot(self, remote: bytes) -> None:
        """Release the slot."""
        self._portal_slots.drop(remote.decode("ascii"))

    def remember_tunnel(self, end: Tunnel) -> None:
        """A connection has become a tunnel."""
        self.tunnels[end] = None
        end.agent.tunnels[end] = None
        session = end.session
        if session is not None:
            self._bind(end, session)
            if session.gone:
                self.context.loop.call_soon(end.revoke)

    def forget_tunnel(self, end: Tunnel) -> None:
        """A tunnel has ended."""
        self.tunnels.pop(end, None)
        end.agent.tunnels.pop(end, None)
        if end.session is not None:
            self._unbind(end, end.session)
        self.closed(end.address)

    def abort_soon(self, end: Tunnel) -> None:
        """Abort a tunnel's client after a time to read its Close frame."""
        self._closing.append((self.context.now + CLOSE_TIMEOUT, end))

    def bind(self, client: Client, session: Session) -> None:
        """Remember which session a connection works for, to end it with the session."""
        if client.session is not None:
            self._unbind(client, client.session)
        client.session = session
        self._bind(client, session)

    def _bind(self, connection: Client | Tunnel, session: Session) -> None:
        if session.connections is None:
            session.connections = {}
            self._active[session] = None
        session.connections[connection] = None

    def _unbind(self, connection: Client | Tunnel, session: Session) -> None:
        if session.connections is not None:
            session.connections.pop(connection, None)

    # Time.

    def turn(self) -> None:
        """Act on the deadlines that have passed; called every `TICK` seconds."""
        now = self.context.now
        self._ticks += 1
        for client in list(self._wheel[self._ticks % _SLOTS]):
            if client.deadline <= now:
                client.expired()
        closing = self._closing
        while closing and closing[0][0] <= now:
            closing.popleft()[1].transport.abort()

    def count_use(self) -> None:
        """Count the requests under way as use."""
        for slot in self._wheel:
            for client in slot:
                client.count_use()

    def watch_writer(self, client: Client) -> None:
        """Abort a client that reads nothing before the time-out."""
        client.unsent = _unsent(client)
        client.deadline = self.context.now + self.context.settings.body_timeout

    def still_writing(self, client: Client) -> bool:
        """Whether a slow client has read something since the last check; if so, another check follows."""
        unsent = _unsent(client)
        if unsent > client.unsent - LEAST_READ:
            return False
        client.unsent = unsent
        client.deadline = self.context.now + self.context.settings.body_timeout
        return True

    def end_expired(self, now: float) -> None:
        """End everything that is open for expired sessions; this does not need the manager."""
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
        """Close all WebSockets: the server shuts down."""
        for end in list(self.tunnels):
            end.shut()

    def close_idle(self) -> None:
        """Close connections that are between two requests."""
        for slot in self._wheel:
            for client in list(slot):
                client.close_if_idle()

    def abort_all(self) -> None:
        """End every connection now."""
        for slot in self._wheel:
            for client in list(slot):
                client.transport.abort()
        for end in list(self.tunnels):
            end.transport.abort()


def plain_address(text: str) -> str:
    """Return an address without its zone, and as IPv4 where it is mapped into IPv6."""
    if text.startswith("::ffff:"):
        mapped = ipaddress.IPv6Address(text).ipv4_mapped
        return str(mapped) if mapped else text
    return text.partition("%")[0]


def _unsent(client: Client) -> int:
    """Return the number of bytes that the client has not taken: in memory, and in the kernel's buffer."""
    waiting = client.transport.get_write_buffer_size()
    sock = client.transport.get_extra_info("socket")
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        return waiting + int(struct.unpack("i", answer)[0])
    except (OSError, AttributeError):
        return waiting
