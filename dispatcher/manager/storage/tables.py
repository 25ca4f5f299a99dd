"""The tables, made of the rows' dataclasses.

Rows are frozen dataclasses, not mapped classes of SQLAlchemy's ORM.  Measured, a mapped AgentRow takes 113 us to
replace (25), 0.57 us to read a member (0.11) and 3 kB (0.3), importing the ORM takes 57 ms at every start, and
mapped instances are mutable, while threads share these.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import sqlalchemy as sa

from dispatcher.manager.storage.database import metadata
from dispatcher.manager.storage.rows import AgentRow, BackendRow, CopyRow, KeptRow, UserRow
from dispatcher.plugin.model import AgentEvent

KEY, UNIQUE, INDEX = {"primary_key": True}, {"unique": True}, {"index": True}


class EnumText(sa.TypeDecorator[enum.Enum]):
    """A member of an enum, stored as its value.  None is stored as ""."""

    impl = sa.String(16)
    cache_ok = True

    def __init__(self, members: type[enum.Enum]) -> None:
        super().__init__()
        self.members = members
        self._values = {member.value for member in members}

    def process_bind_param(self, value: enum.Enum | None, dialect: sa.Dialect) -> str:
        return "" if value is None else str(value.value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> enum.Enum | None:
        return self.members(value) if value or value in self._values else None


class JsonTuple(sa.TypeDecorator[tuple[Any, ...]]):
    """A tuple, stored as a JSON list."""

    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[Any, ...] | None, dialect: sa.Dialect) -> list[Any]:
        return list(value or ())

    def process_result_value(self, value: list[Any] | None, dialect: sa.Dialect) -> tuple[Any, ...]:
        return tuple(value or ())


class JsonDataclass(sa.TypeDecorator[Any]):
    """A dataclass or None, stored as a JSON object; its lists become tuples."""

    impl = sa.JSON
    cache_ok = True

    def __init__(self, cls: type[Any]) -> None:
        super().__init__()
        self.cls = cls

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> dict[str, Any] | None:
        return None if value is None else dataclasses.asdict(value)

    def process_result_value(self, value: dict[str, Any] | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        return self.cls(**{name: tuple(item) if isinstance(item, list) else item for name, item in value.items()})


def _column_type(hint: Any) -> tuple[Any, bool]:
    """Return the column type for an annotation, and whether a value may be missing."""
    if typing.get_origin(hint) in {types.UnionType, typing.Union}:
        return _column_type(hint.__args__[0])[0], True
    if typing.get_origin(hint) is Annotated:
        return sa.String(hint.__metadata__[0]), False
    if typing.get_origin(hint) is tuple:
        return JsonTuple(), False
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return JsonDataclass(hint), False
    if issubclass(hint, enum.Enum):
        return EnumText(hint), False
    return {int: sa.Integer, float: sa.Double, bool: sa.Boolean, str: sa.Text}[hint], False


def _columns(row: type[Any], options: Mapping[str, Mapping[str, Any]]) -> Iterable[sa.Column[Any]]:
    hints = typing.get_type_hints(row, include_extras=True)
    for field in dataclasses.fields(row):
        kind, optional = _column_type(hints[field.name])
        yield sa.Column(field.name, kind, **({"nullable": optional} | dict(options.get(field.name, {}))))


def table(
    name: str, /, *classes: type[Any], without: Iterable[str] = (), **options: Mapping[str, Any]
) -> sa.Table:
    """Return a table with the members of dataclasses as its columns.

    :param without: members that are not stored; :param options: of columns, by name.
    """
    columns = [column for row in classes for column in _columns(row, options) if column.name not in without]
    # Numbered so that another agent of the same name never gets the old one's id, nor its events.
    return sa.Table(name, metadata, *columns, sqlite_autoincrement="id" in options)


def values(row: Any, table: sa.Table) -> dict[str, Any]:
    """Return the members of a row that are columns of a table."""
    kind: Any = type(row)
    return {name: getattr(row, name) for name in _names(kind, table)}


@functools.cache
def _names(row: type[Any], table: sa.Table) -> tuple[str, ...]:
    """Return the columns of a table that are members of a dataclass."""
    members = {field.name for field in dataclasses.fields(row)}
    return tuple(column.name for column in table.columns if column.name in members)


users = table("users", UserRow, id=KEY, name=UNIQUE)
agents = table("agents", AgentRow, without=["user"], id=KEY, name=UNIQUE, user_id=INDEX)
agents.append_constraint(sa.ForeignKeyConstraint(["user_id"], ["users.id"]))
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("agent_id", sa.Integer, nullable=False),
    *_columns(AgentEvent, {}),
    sa.Index("events_of_agent", "agent_id", "id"),
)
#: Host user ids in use: by an agent, or by data that was kept when its agent was removed.
uids = sa.Table(
    "uids",
    metadata,
    sa.Column("uid", sa.Integer, primary_key=True),
    sa.Column("agent", sa.String(300), nullable=False, unique=True),
)
kept = table("kept", KeptRow, agent=KEY)
copies = table("copies", CopyRow, id=KEY, agent=INDEX)
backends = table("backends", BackendRow, name=KEY)
