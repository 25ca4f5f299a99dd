"""Accepting connections that begin with a PROXY header, a TLS handshake, or both.

Until then they are not clients, but each holds a descriptor: they have their own limits, also by address.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from time import thread_time
from typing import Any

from dispatcher.proxy.edge.http.field_names import BadHead
from dispatcher.proxy.edge.http.proxy_protocol import HEAD_SIZE, parse_address, parse_head
from dispatcher.proxy.edge.net.client_base import Client
from dispatcher.proxy.edge.net.clients import Clients, plain_address
from dispatcher.proxy.edge.net.context import Context
from dispatcher.proxy.edge.net.listener import Listener

_TLS_READ = 16 * 1024  # bytes of TLS that are decrypted in one turn of the loop
_TLS_FIRST = 4 * 1024  # the same of a new connection
_TLS_LEAST = 1024  # the same after a read that was slow
_SLOW = 0.002  # seconds of processor time for such a read, above which a connection waits; half for less
_WAIT = 9  # times as long


class Handshakes(Listener):
    """Accepts the connections of one listening socket; those with a successful handshake become clients.

    :param tls: None without TLS; :param header: each connection begins with a PROXY header, before TLS.
    """

    def __init__(self, clients: Clients, sock: socket.socket, tls: ssl.SSLContext | None, *, header: bool) -> None:
        super().__init__(clients, sock)
        self._tls = tls
        self._header = header

    def _begin(self, fd: int, address: str) -> None:
        address = plain_address(address)
        if not self.clients.start_handshake(address):
            os.close(fd)
            return
        sock = socket.socket(self._sock.family, socket.SOCK_STREAM, 0, fd)
        self._run(self._handshake(sock, address))

    async def _handshake(self, sock: socket.socket, address: str) -> None:
        clients = self.clients
        timeout = clients.context.settings.head_timeout
        try:
            client = await asyncio.wait_for(self._read_header(sock), timeout) if self._header else address
            tls = self._tls
            if tls is not None and await asyncio.wait_for(self._is_plain(sock), timeout):
                tls = None

            def protocol() -> Client:
                found = clients.client(client)
                found.to_https = found.same_port = tls is not self._tls
                return found

            loop = clients.context.loop
            if tls is None:
                await loop.connect_accepted_socket(protocol, sock)  # type: ignore[type-var]
            else:
                done = loop.create_future()
                await loop.connect_accepted_socket(
                    lambda: _Turns(clients.context, protocol(), tls, done, timeout), sock
                )
                await done
        except (OSError, asyncio.TimeoutError, BadHead):
            sock.close()
        finally:
            clients.end_handshake(address)

    async def _is_plain(self, sock: socket.socket) -> bool:
        """Whether a connection begins with an HTTP method; a TLS record begins with 22."""
        loop = self.clients.context.loop
        try:
            first = sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            ready = asyncio.Event()
            loop.add_reader(sock, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(sock)
            first = sock.recv(1, socket.MSG_PEEK)
        return first.isalpha()

    async def _read_header(self, sock: socket.socket) -> str | None:
        """Return the client's address of the PROXY header; None if it contains none."""
        command, family, length = parse_head(await self._exactly(sock, HEAD_SIZE))
        return parse_address(command, family, await self._exactly(sock, length))

    async def _exactly(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await self.clients.context.loop.sock_recv(sock, size - len(data))
            if not piece:
                raise BadHead("no PROXY header")
            data += piece
        return data


class _Turns(asyncio.BufferedProtocol):
    """Between a connection and its TLS: other connections get a turn after each `_TLS_READ` bytes.

    The loop's own TLS takes up to 256 KiB at a time, and several times in a turn.  As many messages of TLS itself
    (KeyUpdate; RFC 8446, 4.6.3) take seconds, in which no protocol is called and no timer runs.  Connections whose
    bytes are as slow as those take a tenth of a worker's time, all together.
    """

    def __init__(
        self,
        context: Context,
        client: Client,
        tls: ssl.SSLContext,
        done: asyncio.Future[None],
        timeout: float,
    ) -> None:
        from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]

        self._context = context
        self._tls: Any = SSLProtocol(
            context.loop, client, tls, done, server_side=True, ssl_handshake_timeout=timeout
        )
        self._transport: Any = None
        self._most = _TLS_FIRST

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._tls.connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return memoryview(self._tls.get_buffer(self._most))[: self._most]

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes < self._most:
            self._tls.buffer_updated(nbytes)
            return
        start = thread_time()
        self._tls.buffer_updated(nbytes)
        spent = thread_time() - start
        slow = spent > (_SLOW if self._most == _TLS_READ else _SLOW / 2)
        self._most = _TLS_LEAST if slow else _TLS_READ
        if not self._transport.is_reading():
            return
        self._transport.pause_reading()
        context = self._context
        if slow:
            now = context.clock()
            context.next_slow = max(now, context.next_slow) + spent * _WAIT
            context.loop.call_later(context.next_slow - now, self._read_on)
        else:
            context.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> bool | None:
        return self._tls.eof_received()  # type: ignore[no-any-return]

    def pause_writing(self) -> None:
        self._tls.pause_writing()

    def resume_writing(self) -> None:
        self._tls.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tls.connection_lost(exc)
