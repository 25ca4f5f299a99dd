"""Opening the proxy's listeners, before privileges are dropped.

An address is HOST:PORT, [IPv6]:PORT, unix:/PATH, or ``systemd`` for the sockets of a .socket unit.  systemd keeps
the TCP sockets open while the proxy restarts (FileDescriptorStoreMax=): connections wait for the new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from dispatcher.common import systemd
from dispatcher.common.bind import bind, low_port_fix
from dispatcher.common.log import logger
from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.plugin.names import printable
from dispatcher.plugin.options import takes_ipv4

BACKLOG = 4096
_STORED, _IPV4_TOO = "tcp-", "+ipv4"  # names of the sockets that systemd keeps for the proxy
_DEFER = 1  # seconds
_PATIENCE = 5.0  # seconds to wait until workers of a killed proxy have released an address


class Listeners:
    """The open sockets, by the configuration's key, the address in it, and their name in systemd."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str, str], list[socket.socket]] = {}
        passed = systemd.passed()
        self._activated = [sock for name, sock in passed if not name.startswith(_STORED)]
        self._stored = {name: sock for name, sock in passed if name.startswith(_STORED)}

    def update(self, wanted: Mapping[str, list[str]]) -> None:
        """Open the addresses of all keys that are not open yet, then close the others.

        :raises ConfigError: it is not an address of this host; :raises Unavailable: it cannot be used.  Nothing
            has changed then.
        """
        places = [(key, address, _name(address, beside)) for key, beside in wanted.items() for address in beside]
        for name in self._stored.keys() - {name for _, _, name in places}:  # of another configuration
            systemd.forget(name)
            self._stored.pop(name).close()
        sockets: dict[tuple[str, str, str], list[socket.socket]] = {}
        with contextlib.ExitStack() as opened:
            for where in dict.fromkeys(places):
                if where in self._open:
                    sockets[where] = self._open[where]
                else:
                    sockets[where] = self._opened(*where)
                    opened.callback(_close, sockets[where])
            opened.pop_all()
        for where in self._open.keys() - sockets.keys():
            if name := where[2]:
                systemd.forget(name)
            _close(self._open[where])  # open in old workers until they end
        for where in sockets.keys() - self._open.keys():
            if name := where[2]:
                systemd.store(name, sockets[where][0])
        self._open = sockets

    def _opened(self, key: str, address: str, name: str) -> list[socket.socket]:
        if address == "systemd":
            if not self._activated:
                raise ConfigError(
                    f"{key}: systemd passes no socket",
                    why="LISTEN_FDS is not set for this process",
                    fix="start the proxy through its .socket unit",
                )
            return [_activated(sock, key) for sock in self._activated]
        if address.startswith("unix:"):
            return [bind_unix(address[5:], 0o666)]
        stored = self._stored.pop(name, None)
        return [stored or _tcp(address, key, ipv4_too=name.endswith(_IPV4_TOO))]

    def of(self, key: str) -> list[socket.socket]:
        """Return the sockets of a key."""
        return [sock for (of, _, _), sockets in self._open.items() if of == key for sock in sockets]

    def addresses(self) -> list[str]:
        """Return the addresses of all keys."""
        return [address for _, address, _ in self._open]

    def close(self) -> None:
        """Close all sockets in this process."""
        for sockets in self._open.values():
            _close(sockets)


def _name(address: str, beside: list[str]) -> str:
    """Return the name under which systemd keeps a socket; empty when it does not."""
    if address == "systemd" or address.startswith("unix:"):
        return ""
    return _STORED + quote(address, safe="[]") + (_IPV4_TOO if takes_ipv4(address, beside) else "")


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _tcp(address: str, key: str, *, ipv4_too: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(
            f"{key}: {printable(address)} is not an address of this host",
            why=error.strerror or str(error),
            fix="use an IP address of this host, or 0.0.0.0; the name that users open belongs in proxy.public_url",
        ) from error
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not ipv4_too)
    # Accepted connections inherit these: a client that vanished without a word is noticed.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    # HTTP's client speaks first: the kernel hands a connection over with its first bytes, or after this time
    # without (tcp(7)).  A worker wakes once for accepting and reading, not twice.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER)
    try:
        _bind(sock, where, address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        fix = {
            errno.EADDRINUSE: f"stop what listens there, or change {key}",
            errno.EACCES: low_port_fix(int(port)),
        }.get(error.errno or 0, f"change {key}")
        raise Unavailable(f"Cannot listen on {address}", why=error.strerror or str(error), fix=fix) from error
    return sock


def _bind(sock: socket.socket, where: tuple[object, ...], address: str) -> None:
    end = time.monotonic() + _PATIENCE
    said = False
    while True:
        try:
            bind(sock, where, address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise
            if not said:
                logger("proxy").warning("the address is still in use, waiting", address=address)
                said = True
            time.sleep(0.1)
        else:
            return


def bind_unix(path: str, mode: int) -> socket.socket:
    """Return a listening Unix socket; a leftover of a crash is replaced, a live socket is not.

    :raises Unavailable: another process listens there, or the path is not a socket.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Unavailable(
                f"Cannot listen on {path}", why="a file of another kind exists there", fix="remove it"
            )
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
            except (ConnectionRefusedError, FileNotFoundError):
                logger("proxy").info("replacing a leftover socket", path=path)
                os.unlink(path)
            else:
                raise Unavailable(
                    f"Cannot listen on {path}", why="another process listens there", fix="stop it first"
                )
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Unavailable(f"Cannot listen on {path}", why=error.strerror or str(error)) from error
    return sock


def _activated(sock: socket.socket, key: str) -> socket.socket:
    """Return a copy of a socket of a .socket unit."""
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError(f"{key}: descriptor {sock.fileno()} of systemd is not a listening stream socket")
    return sock.dup()
