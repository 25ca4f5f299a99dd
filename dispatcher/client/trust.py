"""Where a manager is, and whom to believe there: addresses, fingerprints, certificates, tokens.  Reads PEM."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl as tls
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from dispatcher.config.defaults import MANAGER_LOCK
from dispatcher.plugin.errors import BadRequest, ManagerUnreachable
from dispatcher.plugin.names import printable

DEFAULT_PORT = 4443
_UCRED = struct.Struct("3i")
_UNIX = re.compile(r"unix:(?://)?(/[^/].*)")


def unix_path(url: str) -> str:
    """Return the path that ``unix:///PATH`` names, "" for another address."""
    match = _UNIX.fullmatch(url)
    return match[1] if match else ""


def believe(sock: socket.socket, path: str) -> None:
    """Return when the process that listens at a Unix socket is one that may be a manager of ours.

    It is root's or our own user's.  Where the path leads tells nothing: below /tmp somebody else may have made it.
    Root has named a path that it trusts.

    :raises ManagerUnreachable: it is another user's, and would get passwords.
    """
    uid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
    if uid not in {0, os.geteuid()} and os.geteuid() != 0:
        raise ManagerUnreachable(
            f"Will not talk to the manager at {path}",
            why=f"it belongs to user id {uid}, neither root nor you",
            fix="find out who made that socket; set manager.run_dir, or $XDG_RUNTIME_DIR",
        )


def is_starting(path: str) -> bool:
    """Whether a manager holds the lock beside its socket: the socket will answer soon, or the manager just ends.

    The kernel is asked who holds what: to try the lock would keep out the manager that begins just then.
    """
    try:
        lock = Path(path).with_name(MANAGER_LOCK).stat()
        held = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    where = f" {os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino} "
    return any(" FLOCK " in line and where in line for line in held.splitlines())


def token(token: str) -> str:
    """Return a token that can be sent.

    :raises BadRequest: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]{1,4096}", token):
        raise BadRequest(
            "The token cannot be used", why="it is empty or holds other characters", fix="check the token file"
        )
    return token


def fingerprint(text: str) -> str:
    """Return a SHA-256 as 64 hexadecimal digits, however it is written.

    :raises BadRequest: it is none.
    """
    plain = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise BadRequest(
            f"{printable(text)} is no fingerprint",
            why="it has 64 hexadecimal digits, the SHA-256 of the certificate",
            fix="copy the one that the manager logs when it starts",
        )
    return plain


def tcp(url: str, ssl: bool) -> tuple[str, int, bool]:
    """Return host, port and whether to encrypt.

    :raises BadRequest: it is no address, or passwords would cross a network in the clear.
    """
    usage = "use unix:///PATH or https://HOST:PORT"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadRequest(f"{printable(url)} is no address of a manager", why=str(error), fix=usage) from error
    if parts.scheme not in {"https", "http"} or not host or parts.path.strip("/") or parts.query or parts.username:
        raise BadRequest(f"{printable(url)} is no address of a manager", fix=usage)
    if parts.scheme == "https" and ssl:
        return host, port or DEFAULT_PORT, True
    if parts.scheme == "https":
        raise BadRequest(
            f"{url} is with TLS, --no-ssl is without", fix="leave out --no-ssl, or name it http://HOST:PORT"
        )
    if ssl:
        raise BadRequest(f"{url} is without TLS", fix="use https://, or --no-ssl for this machine's loopback")
    if not _loopback(host):
        raise BadRequest(
            f"{url} is without TLS", why="passwords would cross the network in the clear", fix="use https://"
        )
    return host, port or DEFAULT_PORT, False


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def context(
    verify: bool, ca_file: str | Path | None, cert_file: str | Path | None, key_file: str | Path | None
) -> tls.SSLContext:
    """Return how to check the manager.

    :raises BadRequest: a certificate cannot be used.
    """
    made = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
    made.minimum_version = tls.TLSVersion.TLSv1_2
    if not verify:
        made.check_hostname = False
        made.verify_mode = tls.CERT_NONE
    elif ca_file:
        _load(ca_file, lambda: made.load_verify_locations(os.fspath(ca_file)))
    else:
        made.load_default_certs()
    if cert_file:
        key = os.fspath(key_file) if key_file else None
        _load(cert_file, lambda: made.load_cert_chain(os.fspath(cert_file), key))
    return made


def _load(name: str | Path, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise BadRequest(f"Cannot use the certificate {name}", why=str(why), fix="give a PEM file") from error
