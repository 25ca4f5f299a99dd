"""The last bytes of a peer that has closed its connection while the edge was still writing to it.

An app may answer before it has read the whole request, and close: "413 Content Too Large".  The next write then
fails, and the event loop ends the connection without reading what has arrived.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

_PIECE = 65536
_MAX_PIECES = 16


def unread(transport: asyncio.BaseTransport) -> Iterator[bytes]:
    """Yield what has arrived and was not read: in `connection_lost`, while the socket is still open.

    Nothing of a TLS connection, whose socket holds encrypted bytes.
    """
    sock = None if transport.get_extra_info("sslcontext") else transport.get_extra_info("socket")
    fd = -1 if sock is None else sock.fileno()
    for _ in range(_MAX_PIECES if fd >= 0 else 0):
        try:
            data = os.read(fd, _PIECE)
        except OSError:
            return
        if not data:
            return
        yield data
