"""Column types that turn a row's values into what a database stores, and back."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import sqlalchemy as sa


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
