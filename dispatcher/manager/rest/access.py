"""Who may use a listener of the manager, and so which role a caller has.

The role belongs to the listener.  A Unix socket is protected by its file mode and by a check of `SO_PEERCRED`;
over TCP everything but the bare status of /healthz needs a token or a client certificate.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import pwd
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dispatcher.common.log import logger
from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.rest.application import Admit
from dispatcher.manager.rest.routing import Json
from dispatcher.manager.rest.server import Environ
from dispatcher.plugin.errors import ConfigError, Forbidden, Unauthorized

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
