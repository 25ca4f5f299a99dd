"""Who may use a listener of the manager, and so which role a caller has.

The role belongs to the listener.  A Unix socket is protected by its file mode and by a check of `SO_PEERCRED`;
over TCP everything but the bare status of /healthz needs a token or a client certificate.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import pwd
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dispatcher.common.api_tokens import allows
from dispatcher.common.log import logger
from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.auth.tokens import ApiTokens
from dispatcher.manager.rest.application import BEARER, Admit
from dispatcher.manager.rest.routing import Json
from dispatcher.manager.rest.server import Environ
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import ConfigError, Forbidden, Unauthorized

QUIET = 10.0  # seconds between two lines of the log about one address
MAX_QUIET = 10_000  # addresses

_log = logger("manager.access")


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
                        fix="create one: openssl rand -hex 32",
                    )
                if token:
                    digests.append(hashlib.sha256(token.encode()).digest())
        self._digests = digests

    def adopt(self, other: Tokens) -> None:
        """Replace the tokens with those of `other`."""
        self._digests = other._digests

    def known(self, header: str) -> bool:
        """Whether an Authorization field holds one of the tokens; takes the same time for every value."""
        found = hashlib.sha256(bearer(header).encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(found, known) for known in self._digests]
        return any(matches)


def bearer(header: str) -> str:
    """Return the token of an Authorization field, "" where its scheme is another one (RFC 6750, 2.1)."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class _Refusals:
    """Logs refused clients: each address once in `QUIET`, so that guesses do not fill the disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def log(self, address: str) -> None:
        """Log that a client at an address was refused, unless that was logged just now."""
        now = boottime()
        with self._lock:
            if self._until.get(address, 0.0) > now:
                return
            if len(self._until) >= MAX_QUIET:
                self._until = {known: until for known, until in self._until.items() if until > now}
            if len(self._until) < MAX_QUIET:
                self._until[address] = now + QUIET
        _log.warning("refused without a credential", address=address)


def credentials(tokens: Tokens, api_tokens: ApiTokens, status: Callable[[], str]) -> Admit:
    """Return the check that admits a token, a client certificate, and the bare status of /healthz.

    A token of `manager.token_file` and a certificate may do everything, an API token what its scopes say.  The
    answer does not tell whether a token is unknown, expired or revoked.
    """
    refusals = _Refusals()

    def admit(environ: Environ) -> Json | None:
        header = environ.get("HTTP_AUTHORIZATION", "")
        everything = bool(environ.get("dispatcher.certified")) | tokens.known(header)
        row = api_tokens.find(bearer(header))
        if row is not None and not everything:
            environ[BEARER] = row
            api_tokens.touch([row.sha256])
        if environ["PATH_INFO"] == "/healthz" and environ["REQUEST_METHOD"] in {"GET", "HEAD"}:
            known = everything or (row is not None and allows(row.scopes, "read"))
            return None if known else {"status": status()}
        if everything or row is not None:
            return None
        refusals.log(str(environ.get("REMOTE_ADDR") or ""))
        raise Unauthorized(
            "A token or a client certificate is required",
            why="none was given, or it is not valid",
            fix="give --token-file with one of the manager's tokens, or an API token (dispatcher tokens create)",
        )

    return admit
