"""API tokens: creation, check, use, expiry and revocation, in memory and in the database.

A token is for programs: of a person, for the own agents through the edge, or of a service, for the manager's REST
interface.  It has 256 random bits, so guesses need no throttle.  Only its SHA-256 is kept and looked up: how long
that takes reveals nothing about any token.  The last use is written in batches.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import datetime, timezone

from dispatcher.common.api_tokens import NEVER, PREFIX, SCOPES, allows, described
from dispatcher.common.log import logger
from dispatcher.config.messages import did_you_mean
from dispatcher.manager.agents.agent import iso
from dispatcher.manager.auth.sessions import ID_LENGTH, digest
from dispatcher.manager.storage.tokens import TokenRow, TokenStore
from dispatcher.plugin import names
from dispatcher.plugin.deadline import SteadyWallClock
from dispatcher.plugin.errors import BadRequest, Conflict, Forbidden, NotFound, Unavailable
from dispatcher.plugin.options import duration

MAX_PER_OWNER = 50
SHORTEST, LONGEST = 60.0, 3660 * 86400.0  # seconds
FLUSH_INTERVAL = 30.0  # seconds between writes of `last_used`

OnChange = Callable[[Collection[str], Collection[str]], None]

_log = logger("manager.tokens")


class InsufficientScope(Forbidden):
    """A valid token does not have the scope that a request needs (RFC 6750, 3.1)."""

    code = "insufficient-scope"


def new_token() -> str:
    """Return a new token."""
    return PREFIX + secrets.token_urlsafe(32)


def lifetime(expires: str, now: float | None = None) -> float | None:
    """Return the seconds until a token expires; None for ``never``.

    :param expires: ``never``, a duration such as ``90d``, or an ISO 8601 date or time; UTC where it names no zone.
    :param now: Unix time, by default the system's.
    :raises BadRequest: it is neither, or not in the future.
    """
    text = expires.strip()
    if text == NEVER:
        return None
    try:
        seconds = duration(text)
    except ValueError:
        try:
            then = datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            raise BadRequest(
                f"The expiry {names.printable(expires)} is not understood",
                why="expected a duration, a date, or never",
                fix="write it like 90d, 12h, 2030-01-31 or never",
            ) from None
        then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
        seconds = then.timestamp() - (time.time() if now is None else now)
    if not SHORTEST <= seconds <= LONGEST:
        raise BadRequest(
            f"The expiry {names.printable(expires)} is too {'soon' if seconds < SHORTEST else 'late'}",
            why="a token lasts at least a minute, and at most ten years unless it never expires",
            fix="write it like 90d, 12h, 2030-01-31 or never",
        )
    return seconds


def checked_scopes(scopes: Collection[str]) -> tuple[str, ...]:
    """Return scopes in their usual order, each once.

    :raises BadRequest: there is none, or one is unknown.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise BadRequest(
                f"There is no scope {names.printable(scope)}",
                why=did_you_mean(scope, SCOPES, f"the scopes are: {described()}"),
                fix=f"valid are: {', '.join(SCOPES)}",
            )
    if not scopes:
        raise BadRequest("A token needs a scope", why="none was given", fix=f"give one or more of {described()}")
    return tuple(scope for scope in SCOPES if scope in scopes)


class ApiTokens:
    """All API tokens of one installation.  Every method may be called from any thread.

    :param user_id: returns the id that a name has now, None for an unknown one; must not block.
    """

    def __init__(self, store: TokenStore, clock: SteadyWallClock, user_id: Callable[[str], int | None]) -> None:
        self._store = store
        self._clock = clock
        self._user_id = user_id
        self._subscribers: list[OnChange] = []
        self._rows: dict[str, TokenRow] = {}
        self._of_user: dict[str | None, set[str]] = {}  # None: of services
        self._used: set[str] = set()  # since the last write
        self._unwritten: set[str] = set()  # revoked, and not removed from the database yet
        self._lock = threading.RLock()

    def load(self) -> None:
        """Read the stored tokens, without those that have expired or whose user was removed."""
        with self._lock:
            for row in self._store.all():
                self._insert(row)
        self.end_expired()

    def subscribe(self, on_change: OnChange) -> None:
        """Call `on_change(changed, gone)` with the SHA-256s of tokens, from any thread; it must be quick."""
        self._subscribers.append(on_change)

    # --- creation

    def create(
        self,
        *,
        user: str | None = None,
        service: str | None = None,
        scopes: Collection[str],
        seconds: float | None,
        note: str = "",
    ) -> tuple[str, TokenRow]:
        """Return a new token and its row.

        :param user: canonical name of its owner; :param service: name of the program that owns it; one of both.
        :param seconds: until it expires, None: never.
        :raises BadRequest: no owner, both, or scopes that cannot be.
        :raises NotFound: there is no such user; :raises Conflict: the owner has too many tokens.
        """
        if (user is None) == (service is None):
            raise BadRequest(
                "A token has one owner",
                why="it is a user or a service" if user is None else "both a user and a service were given",
                fix="give a user for access to agents, or a service for a program of yours",
            )
        granted = checked_scopes(scopes)
        if service is not None and "app" in granted:
            raise BadRequest(
                "A service has no agents",
                why="the scope app is for users",
                fix="give a user, or leave it out",
            )
        user_id = None if user is None else self._user_id(user)
        if user is not None and user_id is None:
            raise NotFound(f"There is no user {user}", fix="see: dispatcher list")
        now = self._clock.now()
        token = new_token()
        row = TokenRow(
            sha256=digest(token),
            user=user,
            user_id=user_id,
            service=service,
            scopes=granted,
            note=note,
            created=now,
            expires=None if seconds is None else now + seconds,
        )
        with self._lock:
            others = (self._rows[key] for key in self._of_user.get(user, ()))
            if sum(_owner(other) == _owner(row) for other in others) >= MAX_PER_OWNER:
                raise Conflict(
                    f"{user or service} has {MAX_PER_OWNER} tokens",
                    why="that is the most that are possible",
                    fix="revoke one that is no longer needed",
                )
            self._store.add(row)
            self._insert(row)
        _log.info(
            "API token created", id=public_id(row), owner=owner(row), scopes=granted, expires=iso(row.expires)
        )
        self._changed([row.sha256], ())
        return token, row

    def _insert(self, row: TokenRow) -> None:
        self._rows[row.sha256] = row
        self._of_user.setdefault(row.user, set()).add(row.sha256)

    # --- queries

    def find(self, token: str) -> TokenRow | None:
        """Return the row of a token; None if it is unknown, expired or revoked."""
        return self.get(digest(token))

    def get(self, sha256: str) -> TokenRow | None:
        """Return the row of the token with a SHA-256; None if there is none any more."""
        row = self._rows.get(sha256)
        return row if row is not None and self._is_valid(row) else None

    def all(self, user: str | None = None) -> list[TokenRow]:
        """Return all tokens, or those of one user; the newest first."""
        with self._lock:
            keys = self._rows if user is None else self._of_user.get(user, ())
            rows = [self._rows[key] for key in keys]
        return sorted(filter(self._is_valid, rows), key=lambda row: -row.created)

    def by_id(self, id: str, user: str | None = None) -> TokenRow:
        """Return the token with a public id.

        :raises NotFound: there is none (of that user).
        """
        found = [row for row in self.all(user) if public_id(row) == id]
        if len(found) != 1:
            raise NotFound("There is no such token", fix="list the tokens to see their ids")
        return found[0]

    def count(self) -> int:
        """Return the number of tokens."""
        return len(self._rows)

    def ttl(self, row: TokenRow) -> float | None:
        """Seconds until a token expires; None: never."""
        return None if row.expires is None else max(0.0, row.expires - self._clock.now())

    def _is_valid(self, row: TokenRow) -> bool:
        in_time = row.expires is None or row.expires > self._clock.now()
        return in_time and (row.user is None or self._user_id(row.user) == row.user_id)

    def republish(self, user: str | None = None) -> None:
        """Notify the subscribers of tokens, by default of all: what their users may use has changed."""
        self._changed([row.sha256 for row in self.all(user)], ())

    # --- use

    def touch(self, sha256s: Iterable[str]) -> None:
        """Record a use of tokens."""
        now = self._clock.now()
        with self._lock:
            for key in sha256s:
                if (row := self._rows.get(key)) is not None:
                    self._rows[key] = replace(row, last_used=now)
                    self._used.add(key)

    def flush(self) -> None:
        """Write the last use of tokens, and ends that could not be written before."""
        with self._lock:
            used = {key: self._rows[key].last_used or 0.0 for key in self._used if key in self._rows}
            self._used.clear()
            gone = set(self._unwritten)
        try:
            if gone:
                self._store.remove(gone)
                with self._lock:
                    self._unwritten -= gone
            if used:
                self._store.set_last_used(used)
        except Unavailable as error:
            with self._lock:
                self._used.update(used)
            _log.error("API tokens cannot be written, retrying soon", why=str(error))

    # --- end

    def revoke(self, sha256: str) -> None:
        """Revoke a token; idempotent."""
        self._end({sha256}, "revoked")

    def revoke_user(self, user: str) -> int:
        """Revoke all tokens of a user; return how many."""
        with self._lock:
            keys = set(self._of_user.get(user, ()))
        return self._end(keys, "revoked")

    def check_stored(self) -> None:
        """Return if all revocations are in the database; they take effect in any case.

        :raises Unavailable: one is not: it would be lost if the manager ended now.
        """
        if self._unwritten:
            raise Unavailable(
                "The revocation takes effect, but is not stored yet",
                why="the database cannot be written; if the manager ended now, the token would be valid again",
                fix="see the manager's log; the manager tries again every half minute",
                retry_after=FLUSH_INTERVAL,
            )

    def maintain(self) -> None:
        """Call it each `FLUSH_INTERVAL`: end what has expired, and write what is due.

        That an expired token opens nothing does not depend on it.
        """
        self.end_expired()
        self.flush()

    def end_expired(self) -> None:
        """End expired tokens, and those of removed users."""
        with self._lock:
            keys = {key for key, row in self._rows.items() if not self._is_valid(row)}
        if keys:
            self._end(keys, "expired, or its user was removed")

    def _end(self, sha256s: set[str], why: str) -> int:
        """End tokens; notify at once, whether or not the database can be written now."""
        with self._lock:
            gone = {key: row for key in sha256s if (row := self._rows.pop(key, None)) is not None}
            for key, row in gone.items():
                mine = self._of_user[row.user]
                mine.discard(key)
                if not mine:
                    del self._of_user[row.user]
            self._used.difference_update(gone)
            self._unwritten.update(gone)
        if gone:
            self._changed((), list(gone))
            for row in gone.values():
                _log.info("API token ended", id=public_id(row), owner=owner(row), why=why)
            self.flush()
        return len(gone)

    def _changed(self, changed: Collection[str], gone: Collection[str]) -> None:
        for subscriber in self._subscribers:
            subscriber(changed, gone)


def authorize(row: TokenRow, scope: str, method: str, path: str) -> None:
    """Return if a token has a scope; what it changes is logged.

    :raises InsufficientScope: it has not.
    """
    if not allows(row.scopes, scope):
        raise InsufficientScope(
            "The token may not do this",
            why=f"it needs the scope {scope}, and has {', '.join(row.scopes)}",
            fix=f"use a token with the scope {scope}",
            details={"scope": scope},
        )
    if scope == "admin":
        _log.info("request with an API token", id=public_id(row), owner=owner(row), method=method, path=path)


def public_id(row: TokenRow) -> str:
    """Return the public id of a token."""
    return row.sha256[:ID_LENGTH]


def owner(row: TokenRow) -> str:
    """Return the owner for a log."""
    return f"user {row.user}" if row.user is not None else f"service {row.service}"


def _owner(row: TokenRow) -> tuple[int | None, str | None]:
    return row.user_id, row.service
