"""The manager's address and the proofs of identity: URLs, socket owners, fingerprints, certificates, tokens."""

from __future__ import annotations

import grp
import ipaddress
import os
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from dispatcher.common.peer_credentials import peer_credentials
from dispatcher.config.default_paths import MANAGER_LOCK
from dispatcher.plugin.errors import BadRequest, ManagerUnreachable
from dispatcher.plugin.names import printable

DEFAULT_PORT = 4443
BEGINNING = 10.0  # seconds after which a process is no longer new
UNIT = "dispatcher-manager.service"
UNIT_DIRECTORIES = [
    Path(name) for name in ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
]
_UNIX = re.compile(r"unix:(?://)?(/[^/].*)")


def unix_path(url: str) -> str:
    """Return the path that ``unix:///PATH`` names, "" for another address."""
    match = _UNIX.fullmatch(url)
    return match[1] if match else ""


def check_peer(sock: socket.socket, path: str) -> None:
    """Check that the process that listens at a Unix socket belongs to root or to our own user.

    The path alone proves nothing: below /tmp any user may have made the socket.  Root is not checked, as it
    names paths that it trusts.

    :raises ManagerUnreachable: it belongs to another user, who would get passwords.
    """
    _, uid, _ = peer_credentials(sock)
    if uid not in {0, os.geteuid()} and os.geteuid() != 0:
        raise ManagerUnreachable(
            f"The manager at {path} is not trusted",
            why=f"it belongs to user id {uid}, which is neither root nor you",
            fix="find out who made that socket; set manager.run_dir, or $XDG_RUNTIME_DIR",
        )


def is_starting(path: str) -> bool:
    """Whether a manager holds the lock beside its socket: it is starting or ending.

    Reads /proc/locks: taking the lock to test it could make a manager fail that starts at that moment.  One
    that has just begun has no lock yet.
    """
    if _has_just_begun():
        return True
    try:
        lock = Path(path).with_name(MANAGER_LOCK).stat()
        held = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    where = f" {os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino} "
    return any(" FLOCK " in line and where in line for line in held.splitlines())


def _has_just_begun() -> bool:
    """Whether a manager was started a moment ago from the same shell or script (its session, setsid(2))."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if not {b"serve", b"manager"} & {*words} or not any(b"dispatcher" in word for word in words[:4]):
                continue
            numbers = (process / "stat").read_bytes().rpartition(b")")[2].split()[1:]
        except OSError:
            continue
        session, began = int(numbers[2]), int(numbers[18]) / os.sysconf("SC_CLK_TCK")
        if session == os.getsid(0) and now - began < BEGINNING:
            return True
    return False


def how_to_start() -> str:
    """Return how to start a manager: the installed service where there is one."""
    installed = any((directory / UNIT).exists() for directory in UNIT_DIRECTORIES)
    command = f"systemctl start {UNIT.removesuffix('.service')}" if installed else "dispatcher serve"
    return f"start it with `{command}`, or give the --config that it has, or --manager"


def how_to_be_allowed(path: str) -> str:
    """Return how to get access to a manager's socket, whose group may administer."""
    try:
        group = grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError):
        return "become root, or a member of the group that manager.admin_group names"
    if group == "root":
        return "become root: manager.admin_group does not exist on this host"
    return f"become root, or a member of the group {group} (usermod -aG {group} USER), and sign in again"


def token(token: str) -> str:
    """Return `token` if it can be sent in a header field.

    :raises BadRequest: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]{1,4096}", token):
        raise BadRequest(
            "The token cannot be used",
            why="it is empty or contains invalid characters",
            fix="check the token file",
        )
    return token


def fingerprint(text: str) -> str:
    """Return a SHA-256 as 64 hexadecimal digits; accepts capitals, colons and the prefix ``SHA256:``.

    :raises BadRequest: it is not a SHA-256.
    """
    plain = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise BadRequest(
            f"{printable(text)} is not a fingerprint",
            why="a fingerprint is the certificate's SHA-256, 64 hexadecimal digits",
            fix="copy the one that the manager logs when it starts",
        )
    return plain


def tcp(url: str, ssl: bool) -> tuple[str, int, bool]:
    """Return host, port and whether to encrypt.

    :raises BadRequest: it is not an address, or passwords would cross a network unencrypted.
    """
    usage = "use unix:///PATH or https://HOST:PORT"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadRequest(f"{printable(url)} is not the address of a manager", why=str(error), fix=usage) from error
    if parts.scheme not in {"https", "http"} or not host or parts.path.strip("/") or parts.query or parts.username:
        raise BadRequest(f"{printable(url)} is not the address of a manager", fix=usage)
    if parts.scheme == "https" and ssl:
        return host, port or DEFAULT_PORT, True
    if parts.scheme == "https":
        raise BadRequest(
            f"{url} uses TLS, which --no-ssl excludes", fix="leave out --no-ssl, or use http://HOST:PORT"
        )
    if ssl:
        raise BadRequest(f"{url} is without TLS", fix="use https://, or --no-ssl for a loopback address")
    if not is_loopback(host):
        raise BadRequest(
            f"{url} is without TLS", why="passwords would cross the network unencrypted", fix="use https://"
        )
    return host, port or DEFAULT_PORT, False


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
