"""Reads and writes users, agents, their events, host user ids and old copies of data, as typed rows.

An agent's row is written whole, and only over an older version of it: the newest row wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, cast

import sqlalchemy as sa

from dispatcher.manager.storage import tables
from dispatcher.manager.storage.auth import devices
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.rows import AgentRow, BackendRow, CopyRow, KeptRow, UserRow
from dispatcher.manager.storage.tables import values
from dispatcher.plugin.deadline import SteadyWallClock, boot_id
from dispatcher.plugin.errors import Conflict, NotFound
from dispatcher.plugin.model import AgentEvent

MAX_EVENTS = 100_000
LOCAL = "local"  # the authenticator whose passwords are in `UserRow`


def steady_clock(database: Database) -> SteadyWallClock:
    """Return the clock of this boot: the same offset for every process, whatever the wall clock did since."""
    boot = boot_id()
    fresh = SteadyWallClock()
    known, _, offset = database.meta("clock", f"{boot} {fresh.offset!r}").partition(" ")
    if known == boot:
        return SteadyWallClock(float(offset))
    database.set_meta("clock", f"{boot} {fresh.offset!r}")
    return fresh


class Store:
    """Rows in, rows out.  Every method raises `Unavailable` when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # --- users

    def get_user(self, name: str) -> UserRow | None:
        """Return a user by canonical name."""
        found = self.database.select(sa.select(tables.users).where(tables.users.c.name == name))
        return UserRow(**found[0]) if found else None

    def users(self) -> list[UserRow]:
        """Return all users by name."""
        return [
            UserRow(**row) for row in self.database.select(sa.select(tables.users).order_by(tables.users.c.name))
        ]

    def set_password_hash(self, name: str, password_hash: str) -> None:
        """Replace a user's password hash.

        :raises NotFound: there is no such user.
        """
        statement = tables.users.update().where(tables.users.c.name == name)
        if not self.database.execute(statement.values(password_hash=password_hash)):
            raise NotFound(f"There is no user {name}")

    def bind_user(self, name: str, source: str, subject: str | None, groups: Sequence[str]) -> bool:
        """Store what an external authenticator says of a user; return False if the name is another account's.

        A name belongs to the authenticator and to the account (`subject`) that signed in with it first.
        """
        users = tables.users.c
        free = sa.and_(users.source.is_(None), users.password_hash.is_(None))
        same = sa.or_(users.subject.is_(None), users.subject == subject, sa.literal(subject is None))
        statement = tables.users.update().where(
            users.name == name, sa.or_(free, sa.and_(users.source == source, same))
        )
        known = {"subject": subject} if subject is not None else {}
        return bool(
            self.database.execute(statement.values(source=source, groups=tuple(groups), departed=None, **known))
        )

    def set_departed(self, name: str, when: float) -> None:
        """Note that the directory has no account of a user any more, unless that is known; the groups end."""
        users = tables.users.c
        statement = tables.users.update().where(users.name == name, users.departed.is_(None))
        self.database.execute(statement.values(departed=when, groups=()))

    def count_departed(self, now: float, most: float) -> None:
        """Count at most `most` seconds since the last call as passed, for all users who have departed.

        A clock that was wrong during a boot must not make years of them.
        """
        users = tables.users.c
        passed = now - float(self.database.meta("departed", repr(now)))
        statement = tables.users.update().where(users.departed.is_not(None))
        self.database.execute(statement.values(departed=users.departed + passed - min(max(passed, 0.0), most)))
        self.database.set_meta("departed", repr(now))

    def users_of(self, source: str, subject: str) -> list[UserRow]:
        """Return the users that belong to an external account."""
        users = tables.users.c
        query = sa.select(tables.users).where(users.source == source, users.subject == subject)
        return [UserRow(**row) for row in self.database.select(query)]

    def release_user(self, name: str) -> None:
        """Let a name belong to no account: the next sign-in decides.  A password that is stored here is deleted.

        :raises NotFound: there is no such user.
        """
        statement = tables.users.update().where(tables.users.c.name == name)
        if not self.database.execute(
            statement.values(source=None, subject=None, groups=(), departed=None, password_hash=None)
        ):
            raise NotFound(f"There is no user {name}")

    # --- agents

    def agents(self) -> list[AgentRow]:
        """Return all agents by name."""
        query = (
            sa.select(tables.agents, tables.users.c.name.label("user"))
            .join(tables.users, tables.users.c.id == tables.agents.c.user_id)
            .order_by(tables.agents.c.name)
        )
        return [AgentRow(**row) for row in self.database.select(query)]

    def create(
        self, row: AgentRow, *, password_hash: str | None, allocated: bool, events: Sequence[AgentEvent]
    ) -> AgentRow:
        """Insert an agent, and its user when that is new; return the row with its ids.

        A new user without a password who gets kept data belongs to the account to which the data belonged.

        :param allocated: `row.uid` is of the agents' range and is taken for it; kept data of the name is its own.
        :raises Conflict: the name or the user id is taken.
        """
        try:
            with self.database.write() as connection:
                user_id = connection.execute(
                    sa.select(tables.users.c.id).where(tables.users.c.name == row.user)
                ).scalar()
                if user_id is None:
                    user = {"name": row.user, "password_hash": password_hash, "created": row.created, "groups": ()}
                    owner = sa.select(tables.kept.c.source, tables.kept.c.subject)
                    kept = connection.execute(owner.where(tables.kept.c.agent == row.name)).first()
                    if kept is not None and password_hash is None:
                        user |= kept._asdict()
                    user_id = _insert(connection, tables.users, user)
                connection.execute(tables.kept.delete().where(tables.kept.c.agent == row.name))
                if allocated:
                    connection.execute(tables.uids.delete().where(tables.uids.c.agent == row.name))
                    connection.execute(tables.uids.insert(), {"uid": row.uid, "agent": row.name})
                made = dataclasses.replace(row, user_id=user_id)
                made = dataclasses.replace(
                    made, id=_insert(connection, tables.agents, values(made, tables.agents))
                )
                _add_events(connection, [(made.id, event) for event in events])
        except sa.exc.IntegrityError as error:
            raise Conflict(f"The agent {row.name} exists", why=str(error.orig)) from error
        return made

    def save(self, rows: Iterable[AgentRow], events: Iterable[tuple[int, AgentEvent]] = ()) -> None:
        """Write rows and events in one transaction.  A row older than the stored one is left out."""
        with self.database.write() as connection:
            _save(connection, rows)
            _add_events(connection, events)

    def remove(self, row: AgentRow, *, kept: KeptRow | None, events: Sequence[AgentEvent]) -> bool:
        """Delete an agent, and its user and the known browsers with the last one; return whether the user went.

        Its user id stays taken when data is kept.
        """
        with self.database.write() as connection:
            connection.execute(tables.agents.delete().where(tables.agents.c.id == row.id))
            if kept is None:
                connection.execute(tables.uids.delete().where(tables.uids.c.agent == row.name))
                connection.execute(tables.copies.delete().where(tables.copies.c.agent == row.name))
            else:
                users = tables.users.c
                has_password = sa.and_(users.source.is_(None), users.password_hash.is_not(None))
                source = sa.case((has_password, LOCAL), else_=users.source).label("source")
                owner = connection.execute(sa.select(source, users.subject).where(users.id == row.user_id)).one()
                connection.execute(tables.kept.insert(), values(kept, tables.kept) | owner._asdict())
            _add_events(connection, [(row.id, event) for event in events])
            others = sa.select(tables.agents.c.id).where(tables.agents.c.user_id == row.user_id).limit(1)
            if connection.execute(others).first():
                return False
            connection.execute(devices.delete().where(devices.c.user_id == row.user_id))
            connection.execute(tables.users.delete().where(tables.users.c.id == row.user_id))
            return True

    # --- data

    def is_taken(self, uid: int) -> bool:
        """Whether a host user id belongs to an agent or to kept data."""
        return bool(self.database.select(sa.select(tables.uids).where(tables.uids.c.uid == uid)))

    def last_uid(self) -> int | None:
        """Return the highest host user id that is taken."""
        (row,) = self.database.select(sa.select(sa.func.max(tables.uids.c.uid).label("uid")))
        return cast("int | None", row["uid"])

    def kept(self, agent: str) -> KeptRow | None:
        """Return what was kept of a removed agent of this name."""
        found = self.database.select(sa.select(tables.kept).where(tables.kept.c.agent == agent))
        return KeptRow(**found[0]) if found else None

    def remove_kept(self, agent: str) -> None:
        """Forget what was kept of a removed agent; its user id is free again."""
        owned = (tables.kept, tables.uids, tables.copies)
        self.database.execute(*(table.delete().where(table.c.agent == agent) for table in owned))

    def copies(self, agent: str) -> list[CopyRow]:
        """Return an agent's old copies, oldest first."""
        query = sa.select(tables.copies).where(tables.copies.c.agent == agent).order_by(tables.copies.c.id)
        return [CopyRow(**row) for row in self.database.select(query)]

    def add_copy(self, copy: CopyRow, row: AgentRow, events: Iterable[tuple[int, AgentEvent]] = ()) -> None:
        """Record an old copy together with the agent's row: the moment at which a move becomes true."""
        with self.database.write() as connection:
            _insert(connection, tables.copies, values(copy, tables.copies))
            _save(connection, [row])
            _add_events(connection, events)

    def set_copy_directory(self, copy_id: int, directory: str) -> None:
        """Record that a copy is a directory from now on."""
        self.database.execute(
            tables.copies.update().where(tables.copies.c.id == copy_id).values(directory=directory)
        )

    def remove_copy(self, copy_id: int) -> None:
        """Forget a copy."""
        self.database.execute(tables.copies.delete().where(tables.copies.c.id == copy_id))

    def providers(self) -> set[str]:
        """Return the providers that have agents, kept data or old copies."""
        owned = (tables.agents, tables.kept, tables.copies)
        query = sa.union(*(sa.select(table.c.provider) for table in owned))
        return {row["provider"] for row in self.database.select(query)}

    # --- backends

    def backends(self) -> dict[str, BackendRow]:
        """Return what is known of every backend by name."""
        return {row["name"]: BackendRow(**row) for row in self.database.select(sa.select(tables.backends))}

    def save_backend(self, row: BackendRow) -> None:
        """Write what is known of a backend."""
        self.database.execute(
            tables.backends.delete().where(tables.backends.c.name == row.name),
            tables.backends.insert().values(values(row, tables.backends)),
        )

    # --- events

    def events(self, agent_id: int, limit: int) -> list[AgentEvent]:
        """Return the last events of an agent, newest last."""
        query = (
            sa.select(*(tables.events.c[name] for name in _EVENT_COLUMNS))
            .where(tables.events.c.agent_id == agent_id)
            .order_by(tables.events.c.id.desc())
            .limit(limit)
        )
        return [AgentEvent(**row) for row in self.database.select(query)][::-1]

    def trim_events(self) -> None:
        """Forget the oldest events beyond `MAX_EVENTS`."""
        newest = sa.select(sa.func.max(tables.events.c.id) - MAX_EVENTS).scalar_subquery()
        self.database.execute(tables.events.delete().where(tables.events.c.id <= newest))


_EVENT_COLUMNS = tuple(field.name for field in dataclasses.fields(AgentEvent))
_SAVE = (
    tables.agents.update()
    .where(tables.agents.c.id == sa.bindparam("b_id"), tables.agents.c.version < sa.bindparam("b_version"))
    .values({column.name: sa.bindparam(column.name) for column in tables.agents.columns if column.name != "id"})
)


def _insert(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> int:
    """Insert a row with the next number as its id; return the id."""
    key = connection.execute(
        table.insert(), {name: row[name] for name in row if name != "id"}
    ).inserted_primary_key
    if key is None:
        raise RuntimeError("the database returned no key")
    return int(key[0])


def _save(connection: sa.Connection, rows: Iterable[AgentRow]) -> None:
    saved = [{**values(row, tables.agents), "b_id": row.id, "b_version": row.version} for row in rows]
    if saved:
        connection.execute(_SAVE, saved)


def _add_events(connection: sa.Connection, events: Iterable[tuple[int, AgentEvent]]) -> None:
    rows = [{"agent_id": agent_id, **values(event, tables.events)} for agent_id, event in events]
    if rows:
        connection.execute(tables.events.insert(), rows)
