"""All sessions in memory, thread-safe.  No I/O and no clock: times are passed in."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dispatcher.manager.storage.auth import SessionRow

MIN_PAUSE = 0.1  # seconds between two checks for expired sessions
MAX_PAUSE = 30.0
RENEW_SHARE = 0.05  # of the idle time: use is published at most once in that time


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long sessions last, in seconds: at most `lifetime`, and `idle` without a request."""

    lifetime: float
    idle: float


class SessionTable:
    """Sessions by the SHA-256 of their token, and by user.  Every method is atomic."""

    def __init__(self, lifetimes: Lifetimes) -> None:
        self.lifetimes = lifetimes
        self._rows: dict[str, SessionRow] = {}
        self._of_user: dict[str, set[str]] = {}
        self._epochs: dict[str, int] = {}
        self._published: dict[str, float] = {}  # last use that was published
        self._used: set[str] = set()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._rows)

    def ends(self, row: SessionRow) -> float:
        """Return the Unix time at which a session ends without further use."""
        return min(row.created + self.lifetimes.lifetime, row.last_used + self.lifetimes.idle)

    def get(self, sha256: str, now: float) -> SessionRow | None:
        """Return a session, None if it has expired."""
        row = self._rows.get(sha256)
        return row if row and self.ends(row) > now else None

    def valid(self, now: float, user: str | None = None) -> list[SessionRow]:
        """Return the sessions that have not expired, of all users or of one."""
        with self._lock:
            rows = list(self._rows.values()) if user is None else self._of(user)
        return [row for row in rows if self.ends(row) > now]

    def epoch(self, user: str) -> int:
        """Return how often all sessions of a user were ended."""
        return self._epochs.get(user, 0)

    def insert(self, row: SessionRow, epoch: int | None = None) -> bool:
        """Add a session; False if all sessions of the user were ended since `epoch`, or its parent has ended."""
        with self._lock:
            if epoch not in {None, self.epoch(row.user)} or (row.parent and row.parent not in self._rows):
                return False
            self._rows[row.sha256] = row
            self._of_user.setdefault(row.user, set()).add(row.sha256)
            return True

    def set_agent(self, sha256s: Iterable[str], agent: str) -> None:
        """Send sessions to another agent."""
        with self._lock:
            for key in sha256s:
                if row := self._rows.get(key):
                    row.agent = agent

    def touch(self, sha256s: Iterable[str], now: float) -> list[str]:
        """Record a request of sessions and their parents; return those whose new end is to be published."""
        renewed = []
        with self._lock:
            for key in sha256s:
                row = self._rows.get(key)
                for one in (row, self._rows.get(row.parent) if row and row.parent else None):
                    if one is None or self.ends(one) <= now:
                        continue
                    one.last_used = now
                    self._used.add(one.sha256)
                    if now - self._published.get(one.sha256, one.created) >= self.lifetimes.idle * RENEW_SHARE:
                        self._published[one.sha256] = now
                        renewed.append(one.sha256)
        return renewed

    def take_used(self) -> dict[str, float]:
        """Return the last use of the sessions that were used since the last call."""
        with self._lock:
            used = {key: self._rows[key].last_used for key in self._used if key in self._rows}
            self._used.clear()
        return used

    def end(self, sha256s: Collection[str]) -> list[str]:
        """Remove sessions and their children; return those that existed."""
        with self._lock:
            users = {self._rows[key].user for key in sha256s if key in self._rows}
            family = [row for user in users for row in self._of(user)]
            gone = [row for row in family if row.sha256 in sha256s or row.parent in sha256s]
            for row in gone:
                self._remove(row)
        return [row.sha256 for row in gone]

    def end_user(self, user: str, spare: str | None = None) -> list[str]:
        """Remove all sessions of a user but one; sign-ins in progress fail."""
        with self._lock:
            self._epochs[user] = self.epoch(user) + 1
            return self.end({row.sha256 for row in self._of(user) if row.sha256 != spare})

    def expired(self, now: float) -> tuple[set[str], float]:
        """Return the expired sessions, and the seconds until the next check."""
        with self._lock:
            ends = [(self.ends(row), row.sha256) for row in self._rows.values()]
        # A session created later expires at the earliest after four such pauses.
        pause = min([MAX_PAUSE, self.lifetimes.idle / 4, self.lifetimes.lifetime / 4])
        pause = min([pause, *(end - now for end, _ in ends if end > now)])
        return {key for end, key in ends if end <= now}, max(MIN_PAUSE, pause)

    def _of(self, user: str) -> list[SessionRow]:
        return [self._rows[key] for key in self._of_user.get(user, ())]

    def _remove(self, row: SessionRow) -> None:
        del self._rows[row.sha256]
        mine = self._of_user[row.user]
        mine.discard(row.sha256)
        if not mine:
            del self._of_user[row.user]
        self._published.pop(row.sha256, None)
        self._used.discard(row.sha256)
