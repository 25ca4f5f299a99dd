"""Who connected to a Unix socket."""

from __future__ import annotations

import socket
import struct

_UCRED = struct.Struct("3i")


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return process id, user id and group id of the peer of a Unix socket (``SO_PEERCRED``, unix(7))."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid
