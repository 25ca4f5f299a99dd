"""PROXY protocol version 2: who a connection comes from, as a load balancer says it.  Parsing is pure.

With ``proxy.proxy_protocol`` every connection must begin with such a header (haproxy's proxy-protocol.txt,
section 2.2); one that does not is closed.  The header comes before TLS, so these connections are accepted here
rather than by the loop's server.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import struct
from typing import TYPE_CHECKING

from dispatcher.proxy.edge.headers import BadHead

if TYPE_CHECKING:
    from dispatcher.proxy.edge.worker import Worker

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_HEAD = struct.Struct("!12sBBH")
_LONGEST = 4096


def parse_head(head: bytes) -> tuple[int, int, int]:
    """Return command, family and the number of bytes that follow the first sixteen.

    :raises BadHead: this is no PROXY protocol version 2.
    """
    signature, version, family, length = _HEAD.unpack(head)
    if signature != SIGNATURE or version >> 4 != 2 or version & 0x0F > 1 or length > _LONGEST:
        raise BadHead("no PROXY protocol version 2")
    return version & 0x0F, family, length


def parse_address(command: int, family: int, rest: bytes) -> str | None:
    """Return the client's address; None for a health check of the balancer itself, or an unknown family.

    :raises BadHead: the address is cut off.
    """
    if command == 0:
        return None
    kind = family >> 4
    if kind == 1 and len(rest) >= 12:
        return str(ipaddress.IPv4Address(rest[:4]))
    if kind == 2 and len(rest) >= 36:
        address = ipaddress.IPv6Address(rest[:16])
        return str(address.ipv4_mapped or address)
    if kind in {1, 2}:
        raise BadHead("a PROXY header that is cut off")
    return None


class Acceptor:
    """Accepts connections, reads the header, and hands the rest to a client connection."""

    def __init__(self, worker: Worker, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._worker = worker
        self._sock = sock
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin."""
        self._sock.setblocking(False)
        self._worker.loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Stop accepting."""
        self._worker.loop.remove_reader(self._sock)
        self._sock.close()

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            task = self._worker.loop.create_task(self._begin(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _begin(self, sock: socket.socket) -> None:
        worker = self._worker
        sock.setblocking(False)
        try:
            address = await asyncio.wait_for(self._header(sock), worker.settings.head_timeout)
            extra = {} if self._tls is None else {"ssl_handshake_timeout": worker.settings.head_timeout}
            await worker.loop.connect_accepted_socket(lambda: worker.client(address), sock, ssl=self._tls, **extra)
        except (OSError, asyncio.TimeoutError, BadHead):
            sock.close()

    async def _header(self, sock: socket.socket) -> str | None:
        command, family, length = parse_head(await self._exactly(sock, _HEAD.size))
        return parse_address(command, family, await self._exactly(sock, length))

    async def _exactly(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await self._worker.loop.sock_recv(sock, size - len(data))
            if not piece:
                raise BadHead("no PROXY header")
            data += piece
        return data
