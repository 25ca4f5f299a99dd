"""The manager's listeners and their access control.

The role belongs to the listener.  A Unix socket is protected by its file mode and by a check of `SO_PEERCRED`;
over TCP everything but the bare status of /healthz needs a token or a client certificate.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import pwd
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from dispatcher.common.log import logger
from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.rest.application import Admit
from dispatcher.manager.rest.routing import Json
from dispatcher.manager.rest.server import Environ
from dispatcher.plugin.errors import ConfigError, Forbidden, Unauthorized
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
            sock.bind(where)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {address}", why=error.strerror or str(error), fix="see manager.listen"
        ) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def may_administer(accounts: HostAccounts, uid: int, gid: int) -> bool:
    """Whether a process may use manager.sock: root, the manager's user, a member of the administrators' group."""
    if uid in {0, os.geteuid()}:
        return True
    if accounts.admin_gid is None:
        return False
    groups = {gid}
    with suppress(KeyError):
        groups.update(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    return accounts.admin_gid in groups


def may_proxy(accounts: HostAccounts, uid: int, _gid: int) -> bool:
    """Whether a process may use proxy.sock and feed.sock: root, the manager's user, the proxy's user."""
    return uid in {0, os.geteuid(), accounts.proxy_uid}


def peers(allowed: Callable[[int, int], bool]) -> Admit:
    """Return the check that admits only certain processes, by user and group id."""

    def admit(environ: Environ) -> None:
        uid, gid = environ.get("dispatcher.peer", (-1, -1))
        if uid < 0 or not allowed(uid, gid):
            _log.warning("refused a process of another user", uid=uid, path=environ["PATH_INFO"])
            raise Forbidden("You may not use this socket", why=f"the user id {uid} has no access to it")

    return admit


class Tokens:
    """The tokens of `manager.token_file`; only their SHA-256 is kept, all are compared each time."""

    def __init__(self, path: Path | None) -> None:
        """Read the file: one token a line, ``#`` begins a comment.

        :raises ConfigError: it cannot be read, others may read it, or a token can be guessed.
        """
        digests: list[bytes] = []
        if path is not None:
            try:
                if path.stat().st_mode & 0o077:
                    raise ConfigError(f"manager.token_file: {path} can be read by others", fix=f"chmod 600 {path}")
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise ConfigError(f"manager.token_file: cannot read {path}", why=why) from error
            for line in lines:
                token = line.partition("#")[0].strip()
                if token and len(token) < 20:
                    raise ConfigError(
                        f"manager.token_file: a token of {path} is too short",
                        why="it could be guessed, and gives full control",
                        fix="create one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
                    )
                if token:
                    digests.append(hashlib.sha256(token.encode()).digest())
        self._digests = digests

    def adopt(self, other: Tokens) -> None:
        """Replace the tokens with those of `other`."""
        self._digests = other._digests

    def known(self, header: str) -> bool:
        """Whether an Authorization field holds one of the tokens; takes the same time for every value."""
        scheme, _, token = header.partition(" ")
        found = hashlib.sha256(token.strip().encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(found, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def credentials(tokens: Tokens, status: Callable[[], str]) -> Admit:
    """Return the check that admits a token, a client certificate, and the bare status of /healthz."""

    def admit(environ: Environ) -> Json | None:
        if environ.get("dispatcher.certified") or tokens.known(environ.get("HTTP_AUTHORIZATION", "")):
            return None
        if environ["PATH_INFO"] == "/healthz" and environ["REQUEST_METHOD"] in {"GET", "HEAD"}:
            return {"status": status()}
        _log.warning("refused without a credential", address=environ.get("REMOTE_ADDR"))
        raise Unauthorized(
            "A token or a client certificate is required",
            why="none was given, or it is not valid",
            fix="give --token-file with one of the manager's tokens",
        )

    return admit
