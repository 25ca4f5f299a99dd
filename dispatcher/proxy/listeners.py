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

from dispatcher.common.log import logger
from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.plugin.names import printable
from dispatcher.plugin.options import takes_ipv4

BACKLOG = 4096
_FIRST_FD = 3
_DEFER = 1  # seconds
_PATIENCE = 5.0  # seconds to wait until workers of a killed proxy have released an address


def open_all(addresses: list[str], key: str, beside: list[str] | None = None) -> dict[str, list[socket.socket]]:
    """Return the listening sockets of each address.

    :param key: name of the configuration's key, for errors.
    :param beside: the complete list, if `addresses` contains only the new ones.
    :raises ConfigError: an invalid address; :raises Unavailable: it cannot be used.
    """
    opened: dict[str, list[socket.socket]] = {}
    try:
        for address in addresses:
            if address not in opened:
                opened[address] = open_one(address, key, addresses if beside is None else beside)
    except BaseException:
        for sockets in opened.values():
            for sock in sockets:
                sock.close()
        raise
    return opened


def open_one(address: str, key: str, beside: list[str]) -> list[socket.socket]:
    """Return the sockets of one address of a list.

    :raises ConfigError: an invalid address; :raises Unavailable: it cannot be used.
    """
    if address == "systemd":
        return _from_systemd(key)
    if address.startswith("unix:"):
        return [_unix(address[5:], key)]
    host, port = parse(address, key)
    return [_tcp(host, port, address, key, ipv4_too=takes_ipv4(address, beside))]


def parse(address: str, key: str) -> tuple[str, int]:
    """Return host and port of a TCP address.

    :raises ConfigError: an invalid address.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ConfigError(
            f"{key}: found {printable(address)}, expected HOST:PORT, [IPv6]:PORT, unix:/PATH or systemd"
        )
    return host, int(port)


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
            sock.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise
            if not said:
                logger("proxy").warning("the address is still in use, waiting", address=address)
                said = True
            time.sleep(0.1)
        else:
            return


def _unix(path: str, key: str) -> socket.socket:
    if not path.startswith("/"):
        raise ConfigError(f"{key}: found {printable('unix:' + path)}, expected unix: and an absolute path")
    return bind_unix(path, 0o666)


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
