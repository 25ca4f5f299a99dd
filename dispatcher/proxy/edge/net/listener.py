"""Accepting plain connections, and serving the first request of each without the event loop.

A transport of the loop, with its registrations and callbacks, costs as much as a small request, and many programs
(and proxies in front) open a connection for each request.  So a new connection begins as a `PendingConnection`: a
descriptor that is read once and written to.  Many are closed after their answer; any other gets a transport of the
loop as soon as it needs one.

Connections with TLS or the PROXY protocol have to be read first and use the loop from the start (`handshakes`).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import termios
from collections.abc import Coroutine
from typing import Any

from dispatcher.common.log import logger
from dispatcher.proxy.edge.net.client_base import Client
from dispatcher.proxy.edge.net.clients import Clients
from dispatcher.proxy.edge.routing.settings import UNSENT

_BATCH = 8  # connections taken in one turn: others, and other workers, get theirs in between
_FIRST = 16384  # bytes of the first read; the loop reads a longer head or a body
_MAX_UNSENT = 65536  # bytes that wait for the loop's transport before their writer is paused
_ADOPT_AFTER = 0.25  # seconds, twice at most, until the loop watches whether a waiting client is still there
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SCARCE_PAUSE = 0.1  # seconds without accepting while descriptors or memory are short
_NOTHING = b"\0\0\0\0"


class Listener:
    """Accepts the connections of one listening socket; `to_https`: to redirect their requests."""

    def __init__(self, clients: Clients, sock: socket.socket, *, to_https: bool = False) -> None:
        self.clients = clients
        self._to_https = to_https
        self._closed_ones: list[PendingConnection] = []
        self._new: dict[PendingConnection, None] = {}
        self._older: dict[PendingConnection, None] = {}
        self._sock = sock
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start(self) -> None:
        """Begin."""
        self._sock.setblocking(False)
        if self._sock.family != socket.AF_UNIX:
            # Accepted ones inherit both.
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self.clients.context.loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Stop accepting; accepted connections continue."""
        if not self._closed:
            self._closed = True
            self.clients.context.loop.remove_reader(self._sock)
            self._sock.close()

    def _accept(self) -> None:
        accept = self._sock._accept  # type: ignore[attr-defined]  # noqa: SLF001  # what `accept` calls, without a socket object for each
        for _ in range(_BATCH):
            try:
                fd, peer = accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _SCARCE:
                    self._pause(error)
                    break
                continue  # this one is gone already (accept(2))
            os.set_blocking(fd, False)
            self._begin(fd, peer[0] if isinstance(peer, tuple) else "")
        if self._closed_ones:
            self._report_closed()

    def _begin(self, fd: int, address: str) -> None:
        client = self.clients.client(address)
        client.to_https = self._to_https
        pending = PendingConnection(self, fd, client)
        try:
            client.connection_made(pending)
            if pending.fd < 0:
                return
            try:
                data = os.read(fd, _FIRST)
            except BlockingIOError:
                data = b""
            if data:
                client.data_received(data)
                if pending.fd >= 0 and client.is_answering():
                    pending.shelf = shelf = self._new
                    shelf[pending] = None
                    if self._timer is None:
                        self._timer = self.clients.context.loop.call_later(_ADOPT_AFTER, self._adopt_older)
                    return
        except OSError:
            pending.abort()
        except Exception as error:  # as a transport of the loop's does it
            self.clients.context.loop.call_exception_handler(
                {"message": "a new connection failed", "exception": error}
            )
            pending.abort()
        pending.hand_over()

    def _adopt_older(self) -> None:
        """Hand over connections that have waited for a while."""
        for pending in list(self._older):
            pending.hand_over()
        self._older, self._new = self._new, {}
        self._timer = (
            self.clients.context.loop.call_later(_ADOPT_AFTER, self._adopt_older) if self._older else None
        )

    def _pause(self, error: OSError) -> None:
        loop = self.clients.context.loop
        logger("edge").warning("cannot accept connections now", why=error.strerror)
        loop.remove_reader(self._sock)
        loop.call_later(_SCARCE_PAUSE, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self.clients.context.loop.add_reader(self._sock, self._accept)

    def closed(self, pending: PendingConnection) -> None:
        """A connection has been closed; its protocol is notified when it is not in use."""
        if not self._closed_ones:
            self.clients.context.loop.call_soon(self._report_closed)
        self._closed_ones.append(pending)

    def _report_closed(self) -> None:
        ended, self._closed_ones = self._closed_ones, []
        for pending in ended:
            pending.protocol.connection_lost(None)

    def adopt(self, pending: PendingConnection, fd: int) -> None:
        """Create a transport of the loop."""
        sock = socket.socket(self._sock.family, socket.SOCK_STREAM, 0, fd)
        self._run(self._adopt(pending, sock))

    async def _adopt(self, pending: PendingConnection, sock: socket.socket) -> None:
        try:
            await self.clients.context.loop.connect_accepted_socket(lambda: _Adopted(pending), sock)
        except OSError as error:  # the kernel is out of memory or descriptors: end the protocol too
            sock.close()
            pending.protocol.connection_lost(error)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.clients.context.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class PendingConnection(asyncio.Transport):
    """A connection without a transport of the loop; serves as the transport of its protocol.

    :ivar fd: -1 once it was closed or handed over; :ivar shelf: the list in which it waits.
    """

    __slots__ = (
        "_aborted",
        "_closing",
        "_eof",
        "_listener",
        "_paused",
        "_reading",
        "_unsent",
        "fd",
        "protocol",
        "shelf",
    )

    def __init__(self, listener: Listener, fd: int, protocol: Client) -> None:
        self.fd = fd
        self.protocol: Any = protocol
        self.shelf: dict[PendingConnection, None] | None = None
        self._listener = listener
        self._unsent = b""
        self._closing = self._aborted = self._eof = self._paused = False
        self._reading = True

    # Before the loop has a transport.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write at once; the bytes that the kernel does not take, and all later ones, go through the loop."""
        fd = self.fd
        if fd < 0:
            if not self._closing:
                self._keep(data)
            return
        try:
            taken = os.write(fd, data)
        except BlockingIOError:
            taken = 0
        except OSError:
            self.abort()
            return
        if taken < len(data):
            self.hand_over()
            self._keep(data[taken:])
        elif not self.protocol.closing:
            self.hand_over()  # there will be another request

    def _keep(self, data: bytes | bytearray | memoryview) -> None:
        """Buffer bytes for the loop's transport; a fast upstream must wait for it."""
        self._unsent += data
        if len(self._unsent) > _MAX_UNSENT and not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def close(self) -> None:
        """Close; unread bytes of the client must not abort the answer (RFC 9112, 9.6)."""
        if self.fd < 0:
            self._closing = True
            return
        if fcntl.ioctl(self.fd, termios.FIONREAD, _NOTHING) != _NOTHING:
            os.read(self.fd, 1 << 20)
        self._end()

    def abort(self) -> None:
        """Close now."""
        if self.fd < 0:
            self._closing = self._aborted = True
        else:
            self._end()

    def _end(self) -> None:
        os.close(self.fd)
        self.fd = -1
        self._closing = True
        if self.shelf is not None:
            self.shelf.pop(self, None)
        self._listener.closed(self)

    def write_eof(self) -> None:
        """Close the sending side."""
        self._eof = True
        self.hand_over()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Serve another protocol from now on."""
        self.protocol = protocol
        self.hand_over()

    def hand_over(self) -> None:
        """Hand the connection over to the loop, which creates a transport within two turns."""
        fd = self.fd
        if fd >= 0:
            self.fd = -1
            if self.shelf is not None:
                self.shelf.pop(self, None)
            self._listener.adopt(self, fd)

    def adopted(self, transport: asyncio.Transport) -> None:
        """Let the loop's transport take over."""
        protocol = self.protocol
        protocol.transport = transport
        transport.set_protocol(protocol)
        if self._aborted:
            transport.abort()
            return
        if not self._reading:
            transport.pause_reading()
        if self._unsent:
            transport.write(self._unsent)
        if self._paused and transport.get_write_buffer_size() <= transport.get_write_buffer_limits()[1]:
            protocol.resume_writing()  # else the transport does so once the client has read
        if self._eof:
            transport.write_eof()
        if self._closing:
            transport.close()

    # The rest of a transport.

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        del name
        return default

    def pause_reading(self) -> None:
        """Keep the loop's transport from reading; here only the first bytes are read."""
        self._reading = False

    def resume_reading(self) -> None:
        """Let the loop read."""
        self._reading = True
        self.hand_over()


class _Adopted(asyncio.Protocol):
    """Stands between the loop's new transport and the protocol of a `PendingConnection`."""

    def __init__(self, pending: PendingConnection) -> None:
        self._pending = pending

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._pending.adopted(transport)  # type: ignore[arg-type]  # of a stream socket
