"""Sessions, known browsers, and failed sign-in attempts.

Of tokens only the SHA-256 is stored: a copy of the database allows no sign-in.
Times are Unix seconds of the steady clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import sqlalchemy as sa

from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.rows import AgentName, Source, UserName
from dispatcher.manager.storage.tables import INDEX, KEY, table, values

MAX_DEVICES = 20  # known browsers of one user
DEVICE_LIFETIME = 180 * 86400.0  # seconds without a sign-in after which a browser is forgotten
_BATCH = 500

Sha256 = Annotated[str, 64]


@dataclass(slots=True, kw_only=True)
class SessionRow:
    """One session as it is stored.

    :ivar sha256: of the token, hexadecimal; :ivar agent: whose requests it makes.
    :ivar user_id: of `UserRow`: a later user of the same name has another one.
    :ivar host: the one host of a child session; :ivar parent: SHA-256 of its parent.
    """

    sha256: Sha256
    user: UserName
    user_id: int
    agent: AgentName
    created: float
    last_used: float
    host: UserName | None = None
    parent: Sha256 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Where a session was made: shown to its user, who can recognise a foreign one."""

    address: Annotated[str, 64] = ""
    user_agent: Annotated[str, 256] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """The session at another site from which a session came.

    :ivar source: the authenticator; :ivar external: `WebIdentity.session`; :ivar kept: `WebIdentity.kept`.
    """

    source: Source | None = None
    external: Annotated[str, 255] | None = None
    kept: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Account:
    """Failed sign-in attempts counted against one name, address or device.

    :ivar failures: wrong passwords that still count; :ivar last: when the last one was entered; :ivar until: when
        the next attempt is admitted (Unix time, seconds).
    """

    failures: float
    last: float
    until: float


@dataclass(frozen=True, slots=True)
class _Device:
    sha256: Sha256
    user_id: int
    last_used: float


@dataclass(frozen=True, slots=True)
class _Counted:
    key: Annotated[str, 400]


#: Accounts to be stored, by key; None: the account is deleted.
Changes = dict[str, Account | None]


_sessions = table("sessions", SessionRow, Visitor, External, sha256=KEY, user=INDEX, parent=INDEX)
devices = table("devices", _Device, sha256=KEY, user_id=INDEX)
_throttle = table("throttle", _Counted, Account, key=KEY)


class AuthStore:
    """The tables of this module, in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Sessions.

    def sessions(self) -> list[SessionRow]:
        """Return all sessions."""
        query = sa.select(*(_sessions.c[field.name] for field in dataclasses.fields(SessionRow)))
        return [SessionRow(**row) for row in self._database.select(query)]

    def add_session(
        self, row: SessionRow, visitor: Visitor, *, device: str | None = None, external: External | None = None
    ) -> None:
        """Keep a new session, and the browser that made it when `device` (a SHA-256) is given."""
        columns = values(row, _sessions) | values(visitor, _sessions) | values(external or External(), _sessions)
        with self._database.write() as connection:
            connection.execute(_sessions.insert(), columns)
            if device:
                self._add_device(connection, device, row.user_id, row.created)

    def visitors(self, sha256s: Iterable[str]) -> dict[str, Visitor]:
        """Return where sessions were made."""
        return {
            row["sha256"]: Visitor(address=row["address"], user_agent=row["user_agent"])
            for batch in _batches(sha256s)
            for row in self._database.select(sa.select(_sessions).where(_sessions.c.sha256.in_(batch)))
        }

    def external(self, sha256: str) -> External:
        """Return the session at another site from which a session came."""
        columns = (_sessions.c.source, _sessions.c.external, _sessions.c.kept)
        found = self._database.select(sa.select(*columns).where(_sessions.c.sha256 == sha256))
        return External(**found[0]) if found else External()

    def sessions_from(self, source: str, external: str, users: Collection[int] = ()) -> list[str]:
        """Return the sessions that came from one session at another site.

        :param users: their sessions count, too, if it is not known from which session they came.
        """
        column = _sessions.c
        unknown = sa.and_(column.external.is_(None), column.user_id.in_(users))
        wanted = (column.source == source, sa.or_(column.external == external, unknown))
        return [row["sha256"] for row in self._database.select(sa.select(column.sha256).where(*wanted))]

    def remove_sessions(self, sha256s: Iterable[str]) -> None:
        """Forget sessions."""
        self._database.execute(
            *(_sessions.delete().where(_sessions.c.sha256.in_(batch)) for batch in _batches(sha256s))
        )

    def set_agent(self, sha256s: Iterable[str], agent: str) -> None:
        """Send sessions to another agent."""
        update = _sessions.update().values(agent=agent)
        self._database.execute(*(update.where(_sessions.c.sha256.in_(batch)) for batch in _batches(sha256s)))

    def set_last_used(self, times: Mapping[str, float]) -> None:
        """Store when sessions were last used."""
        if not times:
            return
        update = (
            _sessions.update()
            .where(_sessions.c.sha256 == sa.bindparam("which"))
            .values(last_used=sa.bindparam("used"))
        )
        with self._database.write() as connection:
            connection.execute(update, [{"which": sha256, "used": used} for sha256, used in times.items()])

    # Known browsers.

    def knows_device(self, sha256: str, user_id: int, now: float) -> bool:
        """Whether a user has signed in from the browser with this token, lately and with the same password."""
        return any(now - used < DEVICE_LIFETIME for used in self._uses(sha256, user_id))

    def has_device(self, sha256: str, user_id: int) -> bool:
        """Whether a user has ever signed in from the browser that holds this token."""
        return bool(self._uses(sha256, user_id))

    def _uses(self, sha256: str, user_id: int) -> list[float]:
        query = sa.select(devices).where(devices.c.sha256 == sha256, devices.c.user_id == user_id)
        return [row["last_used"] for row in self._database.select(query)]

    def distrust_devices(self, user_id: int) -> None:
        """Let none of a user's browsers be known until it signs in again."""
        self._database.execute(devices.update().where(devices.c.user_id == user_id).values(last_used=0.0))

    def _add_device(self, connection: sa.Connection, sha256: str, user_id: int, now: float) -> None:
        connection.execute(devices.delete().where(devices.c.sha256 == sha256))
        connection.execute(devices.insert().values(sha256=sha256, user_id=user_id, last_used=now))
        mine = sa.select(devices.c.sha256).where(devices.c.user_id == user_id)
        mine = mine.order_by(devices.c.last_used.desc())
        if extra := connection.execute(mine.offset(MAX_DEVICES)).scalars().all():
            connection.execute(devices.delete().where(devices.c.sha256.in_(extra)))

    def pull_back(self, now: float) -> None:
        """Set stored times later than `now` to `now`: the clock was ahead before, or is behind since the boot.

        Otherwise a delay of seconds would last as long as the difference, and a session would not expire.
        """
        last = _throttle.c.last
        later = [(_sessions, "created"), (_sessions, "last_used"), (devices, "last_used")]
        self._database.execute(
            _throttle.update().where(last > now).values(until=_throttle.c.until - last + now, last=now),
            *(each.update().where(each.c[name] > now).values({name: now}) for each, name in later),
        )

    # Failed sign-in attempts.

    def accounts(self) -> dict[str, Account]:
        """Return the failed attempts counted for names, addresses and devices."""
        rows = self._database.select(sa.select(_throttle))
        return {row["key"]: Account(row["failures"], row["last"], row["until"]) for row in rows}

    def keep(self, changes: Changes) -> None:
        """Store the changes that a `Throttle` returned."""
        if not changes:
            return
        with self._database.write() as connection:
            for batch in _batches(changes):
                connection.execute(_throttle.delete().where(_throttle.c.key.in_(batch)))
            rows = [{"key": key, **values(account, _throttle)} for key, account in changes.items() if account]
            if rows:
                connection.execute(_throttle.insert(), rows)


def _batches(keys: Iterable[str]) -> Iterable[list[str]]:
    """Cut keys into pieces that fit one statement."""
    every = list(keys)
    return (every[index : index + _BATCH] for index in range(0, len(every), _BATCH))
