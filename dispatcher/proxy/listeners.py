"""Opening the proxy's listeners, before privileges are dropped.

An address is HOST:PORT, [IPv6]:PORT, unix:/PATH, or ``systemd`` for the sockets that the service manager
passes (sd_listen_fds(3)).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterable, Mapping

from dispatcher.common.bind import bind
from dispatcher.common.log import logger
from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.plugin.names import printable
from dispatcher.plugin.options import takes_ipv4

BACKLOG = 4096
_FIRST_FD = 3
_DEFER = 1  # seconds
_PATIENCE = 5.0  # seconds to wait until workers of a killed proxy have released an address


class Listeners:
    """The open sockets, by the configuration's key and the address in it."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], list[socket.socket]] = {}

    def update(self, wanted: Mapping[str, list[str]]) -> None:
        """Open the addresses of all keys that are not open yet, then close the others.

        :raises ConfigError: it is not an address of this host; :raises Unavailable: it cannot be used.  Nothing
            has changed then.
        """
        sockets: dict[tuple[str, str], list[socket.socket]] = {}
        with contextlib.ExitStack() as opened:
            for key, addresses in wanted.items():
                for address in addresses:
                    where = key, address
                    if where in self._open:
                        sockets[where] = self._open[where]
                    elif where not in sockets:
                        sockets[where] = _opened(address, key, addresses)
                        opened.callback(_close, sockets[where])
            opened.pop_all()
        for where, old in self._open.items():
            if where not in sockets:  # open in old workers until they end
                _close(old)
        self._open = sockets

    def of(self, key: str) -> list[socket.socket]:
        """Return the sockets of a key."""
        return [sock for (of, _), sockets in self._open.items() if of == key for sock in sockets]

    def addresses(self) -> list[str]:
        """Return the addresses of all keys."""
        return [address for _, address in self._open]

    def close(self) -> None:
        """Close all sockets in this process."""
        for sockets in self._open.values():
            _close(sockets)


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _opened(address: str, key: str, beside: list[str]) -> list[socket.socket]:
    if address == "systemd":
        return _from_systemd(key)
    if address.startswith("unix:"):
        return [bind_unix(address[5:], 0o666)]
    host, _, port = address.rpartition(":")
    return [_tcp(host.strip("[]"), int(port), address, key, ipv4_too=takes_ipv4(address, beside))]


def _tcp(host: str, port: int, address: str, key: str, *, ipv4_too: bool) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{key}: {printable(address)} is not an address of this host", why=str(error)) from error
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
            errno.EACCES: "ports below 1024 need root, or CAP_NET_BIND_SERVICE, or systemd's socket activation",
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


def _from_systemd(key: str) -> list[socket.socket]:
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "").isdecimal():
        raise ConfigError(
            f"{key}: systemd passes no socket",
            why="LISTEN_FDS is not set for this process",
            fix="start the proxy through its .socket unit",
        )
    sockets = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(os.environ["LISTEN_FDS"])):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=os.dup(fd))
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(f"{key}: descriptor {fd} of systemd is not a listening stream socket")
        sockets.append(sock)
    return sockets
