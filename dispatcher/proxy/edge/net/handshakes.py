"""Accepting connections that begin with a PROXY header, a TLS handshake, or both.

Until then they are not clients, but each holds a descriptor: they have their own limits, also by address.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl

from dispatcher.proxy.edge.http.field_names import BadHead
from dispatcher.proxy.edge.http.proxy_protocol import HEAD_SIZE, parse_address, parse_head
from dispatcher.proxy.edge.net.client_base import Client
from dispatcher.proxy.edge.net.clients import Clients, plain_address
from dispatcher.proxy.edge.net.listener import Listener


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
            extra = {} if tls is None else {"ssl_handshake_timeout": timeout}

            def protocol() -> Client:
                found = clients.client(client)
                found.to_https = found.same_port = tls is not self._tls
                return found

            await clients.context.loop.connect_accepted_socket(protocol, sock, ssl=tls, **extra)  # type: ignore[type-var]
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
