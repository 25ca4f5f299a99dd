"""Sessions: creation, use, expiry and revocation, in memory and in the database.

A token has 256 random bits; only its SHA-256 is kept.  A session ends at the end of its lifetime, after a time
without a request, when it is revoked, or with its parent; a thread ends expired sessions.  Times are of the steady
clock: a jump of the wall clock ends no session.  The last use is written in batches: after a crash of the manager
the last half minute of use is lost, which is little against the time of expiry.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from dispatcher.common.log import logger
from dispatcher.manager.storage.auth import AuthStore, External, SessionRow, Visitor
from dispatcher.plugin.deadline import SteadyWallClock
from dispatcher.plugin.errors import Forbidden, NotFound, Unavailable

ID_LENGTH = 16  # hexadecimal digits of a session's public id
MAX_PER_USER = 100
FLUSH_INTERVAL = 30.0  # seconds between writes of `last_used`
MIN_PAUSE = 0.1  # seconds between two checks for expired sessions
MAX_PAUSE = 30.0
RENEW_SHARE = 0.05  # of the idle time: use is published at most once in that time

OnChange = Callable[[Collection[str], Collection[str]], None]

_log = logger("manager.sessions")


def new_token() -> str:
    """Return 256 random bits as text for a cookie."""
    return secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """Return the SHA-256 of a token in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long sessions last, in seconds: at most `lifetime`, and `idle` without a request."""

    lifetime: float
    idle: float


class Standing(NamedTuple):
    """A user's id and the number of times that all its sessions were ended; a sign-in fails if either changes."""

    user_id: int | None
    ended: int


class Sessions:
    """All sessions of one installation.  Every method may be called from any thread.

    A session belongs to a user's id, and ids are not reused.  So sessions of a removed user that could not be
    ended are not valid for a later user of the same name.

    :param user_id: returns the id that a name has now, None for an unknown one; must not block.
    """

    def __init__(
        self,
        store: AuthStore,
        clock: SteadyWallClock,
        lifetimes: Lifetimes,
        user_id: Callable[[str], int | None],
    ) -> None:
        self.user_id = user_id
        self._store = store
        self._clock = clock
        self._lifetimes = lifetimes
        self._subscribers: list[OnChange] = []
        self._rows: dict[str, SessionRow] = {}
        self._of_user: dict[str, dict[str, SessionRow]] = {}
        self._ended: dict[str, int] = {}
        self._published: dict[str, float] = {}  # last use that was published
        self._used: set[str] = set()  # since the last write
        self._lock = threading.RLock()  # of all these tables
        self._unwritten: deque[Callable[[], object]] = deque()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def load(self) -> None:
        """Read the stored sessions; drop those of users who were removed."""
        rows = {row.sha256: row for row in self._store.sessions()}
        known = {key for key, row in rows.items() if self._is_of_user(row)}
        known -= {key for key in known if (parent := rows[key].parent) and parent not in known}
        self._store.remove_sessions(rows.keys() - known)
        for key in known:
            self._insert(rows[key])
        self.end_expired()

    def start(self) -> None:
        """Begin to end expired sessions."""
        self._thread = threading.Thread(target=self._run, name="dispatcher-sessions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; write pending changes."""
        self._closing.set()
        self._wake.set()
        if self._thread:
            self._thread.join(10)
        self.flush()

    def subscribe(self, on_change: OnChange) -> None:
        """Call `on_change(changed, gone)` with the SHA-256s of sessions, from any thread; it must be quick."""
        self._subscribers.append(on_change)

    def set_lifetimes(self, lifetimes: Lifetimes) -> None:
        """Use other lifetimes from now on, for existing sessions too."""
        self._lifetimes = lifetimes
        self._wake.set()
        self._changed([row.sha256 for row in self.all()], ())

    # --- creation

    def standing(self, user: str) -> Standing:
        """Return the standing of a user, for `create`."""
        return Standing(self.user_id(user), self._ended.get(user, 0))

    def create(
        self,
        user: str,
        agent: str,
        visitor: Visitor,
        *,
        standing: Standing,
        device: str | None = None,
        external: External | None = None,
    ) -> tuple[str, SessionRow]:
        """Return a new token and its session.

        :param standing: from before the password was checked, so that a sign-in that overlaps a change of the
            password, or a removal, does not outlive it.
        :param device: SHA-256 of the token that identifies this browser from now on.
        :param external: the session at another site from which it comes.
        :raises Forbidden: all sessions of the user were ended meanwhile, or the user was removed.
        """
        if standing.user_id is None:
            raise _ended_meanwhile()
        now = self._clock.now()
        row = SessionRow(sha256="", user=user, user_id=standing.user_id, agent=agent, created=now, last_used=now)
        return self._add(row, visitor, standing, device, external)

    def child(self, parent: SessionRow, host: str, agent: str) -> tuple[str, SessionRow]:
        """Return a new token and its session for one host, which ends with `parent`.

        :raises Forbidden: the parent has ended.
        """
        standing = self.standing(parent.user)
        visitor = self._store.visitors([parent.sha256]).get(parent.sha256, Visitor())
        row = replace(parent, agent=agent, last_used=self._clock.now(), host=host, parent=parent.sha256)
        return self._add(row, visitor, standing, None)

    def renew(self, sha256: str) -> tuple[str, SessionRow]:
        """Replace a session by a new one of the same user, and end all others: the password was changed.

        :raises NotFound: the session has ended.
        """
        old = self.require(sha256)
        visitor = self._store.visitors([sha256]).get(sha256, Visitor())
        token, row = self.create(old.user, old.agent, visitor, standing=self.standing(old.user))
        self.revoke_user(old.user, spare=row.sha256)
        return token, row

    def _add(
        self,
        row: SessionRow,
        visitor: Visitor,
        standing: Standing,
        device: str | None,
        external: External | None = None,
    ) -> tuple[str, SessionRow]:
        token = new_token()
        row = replace(row, sha256=digest(token))
        self._store.add_session(row, visitor, device=device, external=external)
        with self._lock:
            valid = (
                standing == self.standing(row.user)
                and self._is_of_user(row)
                and (row.parent is None or row.parent in self._rows)
            )
            if valid:
                self._insert(row)
        if not valid:
            self._store.remove_sessions([row.sha256])
            raise _ended_meanwhile()
        self._changed([row.sha256], ())
        mine = self.all(row.user)
        if len(mine) > MAX_PER_USER:
            oldest = sorted(mine, key=lambda other: other.last_used)[: len(mine) - MAX_PER_USER]
            self._end({other.sha256 for other in oldest} - {row.sha256, row.parent or ""})
        return token, row

    def _insert(self, row: SessionRow) -> None:
        self._rows[row.sha256] = row
        self._of_user.setdefault(row.user, {})[row.sha256] = row

    # --- queries

    def get(self, sha256: str) -> SessionRow | None:
        """Return a session, None if it has ended."""
        row = self._rows.get(sha256)
        return row if row and self._is_valid(row, self._clock.now()) else None

    def require(self, sha256: str) -> SessionRow:
        """Return a session.

        :raises NotFound: it has ended or is unknown.
        """
        row = self.get(sha256)
        if row is None:
            raise NotFound("There is no such session", why="it has ended", fix="sign in again")
        return row

    def by_id(self, id: str, user: str | None = None) -> SessionRow:
        """Return the session with a public id.

        :raises NotFound: there is none (of that user).
        """
        found = [row for row in self.all(user) if row.sha256[:ID_LENGTH] == id]
        if len(found) != 1:
            raise NotFound("There is no such session", fix="list the sessions to see their ids")
        return found[0]

    def all(self, user: str | None = None) -> list[SessionRow]:
        """Return the sessions, of all users or of one."""
        now = self._clock.now()
        with self._lock:
            rows = list((self._rows if user is None else self._of_user.get(user, {})).values())
        return [row for row in rows if self._is_valid(row, now)]

    def _is_valid(self, row: SessionRow, now: float) -> bool:
        return self.expires(row) > now and self._is_of_user(row)

    def _is_of_user(self, row: SessionRow) -> bool:
        """Whether a session is of the user that has the name now, not of an earlier one."""
        return self.user_id(row.user) == row.user_id

    def count(self) -> int:
        """Return the number of sessions."""
        return len(self._rows)

    def visitors(self, rows: Iterable[SessionRow]) -> dict[str, Visitor]:
        """Return where sessions were created, by SHA-256."""
        return self._store.visitors([row.sha256 for row in rows])

    def expires(self, row: SessionRow) -> float:
        """Unix time at which a session ends if it is not used."""
        return min(row.created + self._lifetimes.lifetime, row.last_used + self._lifetimes.idle)

    def ttl(self, row: SessionRow) -> float:
        """Seconds until a session ends if it is not used."""
        return max(0.0, self.expires(row) - self._clock.now())

    def lifetime(self, row: SessionRow) -> float:
        """Seconds until a session ends even if it is used."""
        return max(0.0, row.created + self._lifetimes.lifetime - self._clock.now())

    # --- use

    def select(self, sha256: str, agent: str) -> SessionRow:
        """Send a session's requests to another agent, which the caller has checked to be the user's.

        :raises NotFound: the session has ended.
        """
        row = self.require(sha256)
        self._store.set_agent([sha256], agent)
        row.agent = agent
        self._changed([sha256], ())
        return row

    def replace_agent(self, user: str, gone: str, agent: str) -> None:
        """Send the sessions of a removed agent to another one of the same user; those for its host end."""
        rows = [row for row in self.all(user) if row.agent == gone]
        moved = [row for row in rows if not row.host]
        keys = [row.sha256 for row in moved]
        for row in moved:
            row.agent = agent
        self._changed(keys, ())
        self._end({row.sha256 for row in rows if row.host})
        self._write(partial(self._store.set_agent, keys, agent))

    def touch(self, sha256s: Iterable[str]) -> None:
        """Record a request of these sessions, and of their parents."""
        now = self._clock.now()
        with self._lock:
            rows = {key: row for key in sha256s if (row := self._rows.get(key))}
            rows.update({row.parent: self._rows[row.parent] for row in list(rows.values()) if row.parent})
            used = {key: row for key, row in rows.items() if self.expires(row) > now}
            due = now - self._lifetimes.idle * RENEW_SHARE
            renewed = [key for key, row in used.items() if self._published.get(key, row.created) <= due]
            self._published.update(dict.fromkeys(renewed, now))
            self._used.update(used)
            for row in used.values():
                row.last_used = now
        self._changed(renewed, ())

    # --- end

    def revoke(self, sha256: str) -> None:
        """End a session and its children; idempotent."""
        self._end({sha256})

    def revoke_user(self, user: str, *, spare: str | None = None) -> int:
        """End all sessions of a user but one; return how many."""
        with self._lock:  # sign-ins in progress fail
            self._ended[user] = self._ended.get(user, 0) + 1
            keys = set(self._of_user.get(user, ())) - {spare}
        return self._end(keys)

    def end_expired(self) -> float:
        """End expired sessions, and those of removed users; return the seconds until the next check."""
        now = self._clock.now()
        with self._lock:
            ends = {key: self.expires(row) if self._is_of_user(row) else now for key, row in self._rows.items()}
        self._end({key for key, end in ends.items() if end <= now})
        # A session created later expires at the earliest after four such pauses.
        pause = min(MAX_PAUSE, self._lifetimes.idle / 4, self._lifetimes.lifetime / 4)
        return max(MIN_PAUSE, min([pause, *(end - now for end in ends.values() if end > now)]))

    def flush(self) -> None:
        """Write the last use of sessions, and what could not be written before."""
        with self._lock:
            used = {key: self._rows[key].last_used for key in self._used}
            self._used.clear()
        try:
            self._write()
            self._store.set_last_used(used)
        except BaseException:
            with self._lock:
                self._used.update(used.keys() & self._rows.keys())
            raise

    def _end(self, sha256s: set[str]) -> int:
        """End sessions and their children; notify at once, whether or not the database can be written now."""
        with self._lock:
            users = {self._rows[key].user for key in sha256s if key in self._rows}
            family = [row for user in users for row in self._of_user[user].values()]
            gone = [row.sha256 for row in family if row.sha256 in sha256s or row.parent in sha256s]
            for key in gone:
                row = self._rows.pop(key)
                self._published.pop(key, None)
                del self._of_user[row.user][key]
                if not self._of_user[row.user]:
                    del self._of_user[row.user]
            self._used.difference_update(gone)
        if gone:
            self._changed((), gone)
            self._write(partial(self._store.remove_sessions, gone))
        return len(gone)

    def _write(self, *changes: Callable[[], object]) -> None:
        """Change the database, in order; what cannot be written now is written by the next call."""
        self._unwritten.extend(changes)
        with self._writing:
            while self._unwritten:
                try:
                    self._unwritten[0]()
                except Unavailable as error:
                    _log.error("sessions cannot be written, retrying soon", why=str(error))
                    return
                except Exception:  # it would be in the way of all that follow
                    _log.exception("a change of sessions cannot be written")
                self._unwritten.popleft()

    def _changed(self, changed: Collection[str], gone: Collection[str]) -> None:
        if changed or gone:
            for subscriber in self._subscribers:
                subscriber(changed, gone)

    def _run(self) -> None:
        flushed = self._clock.now()
        pause = 0.0
        while not self._closing.is_set():
            self._wake.wait(pause)
            self._wake.clear()
            pause = FLUSH_INTERVAL
            try:
                pause = self.end_expired()
                if self._clock.now() - flushed >= FLUSH_INTERVAL:
                    flushed = self._clock.now()
                    self.flush()
            except Exception:
                _log.exception("sessions cannot be written, retrying soon")


def _ended_meanwhile() -> Forbidden:
    return Forbidden("All sessions of this user were ended during the sign-in", fix="sign in again")
