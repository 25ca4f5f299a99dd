"""The sockets on which the manager listens.  `access` determines who may use them."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from dispatcher.common.bind import bind, low_port_fix
from dispatcher.common.forked import close_in_children
from dispatcher.common.log import logger
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.options import takes_ipv4

SOCKET_MODE = 0o660
_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.%]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})")

_log = logger("manager.listeners")


def unix_socket(path: Path, gid: int | None) -> socket.socket:
    """Return a bound socket of mode 0660 and the given group; at no moment has it more permissions.

    An existing socket is a leftover and is removed: the caller holds the lock of the run directory.

    :raises ConfigError: the path is not a socket, or the directory cannot be written.
    """
    if path.is_socket():
        _log.warning("removed a leftover socket", path=str(path))
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"Cannot create the socket {path}", why=str(error.strerror), fix="see run_dir"
        ) from error
    finally:
        os.umask(before)
    if gid is not None and gid != os.getegid():
        os.chown(path, -1, gid)
    path.chmod(SOCKET_MODE)
    return sock


def tcp_socket(address: str, beside: Iterable[str] = ()) -> socket.socket:
    """Return a socket bound to ``HOST:PORT`` or ``[IPv6]:PORT``.

    :param beside: the other addresses.
    :raises ConfigError: it is not an address, or cannot be bound.
    """
    match = _ADDRESS.fullmatch(address)
    if not match or int(match["port"]) > 65535:
        raise ConfigError(
            f"manager.listen: found {address!r}",
            why="expected HOST:PORT or [IPv6]:PORT",
            fix="for example [::]:4443",
        )
    host, port = match["six"] or match["host"], int(match["port"])
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not takes_ipv4(address, beside))
            bind(sock, where, address)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        refused = error.errno == errno.EACCES
        fix = low_port_fix(port, "dispatcher-manager") if refused else "see manager.listen"
        raise ConfigError(f"Cannot listen on {address}", why=error.strerror or str(error), fix=fix) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    close_in_children(sock)
    return sock
