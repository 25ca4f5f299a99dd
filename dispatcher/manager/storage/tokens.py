"""API tokens.  Only their SHA-256 is stored: a copy of the database gives no access.

Times are Unix seconds of the steady clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

import sqlalchemy as sa

from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.rows import UserName
from dispatcher.manager.storage.tables import INDEX, KEY, table, values

MAX_NOTE = 200  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One token as it is stored.

    :ivar sha256: of the token, hexadecimal.
    :ivar user: its owner, and :ivar user_id: the owner's id: a later user of the same name has another one.
    :ivar service: its owner where that is a program of the operator's; either this or `user` is None.
    :ivar expires: None for a token that does not; :ivar last_used: None before the first use.
    """

    sha256: Annotated[str, 64]
    user: UserName | None
    user_id: int | None
    service: UserName | None
    scopes: tuple[str, ...]
    note: Annotated[str, MAX_NOTE]
    created: float
    expires: float | None
    last_used: float | None = None


_tokens = table("tokens", TokenRow, sha256=KEY, user_id=INDEX)


class TokenStore:
    """The table of tokens, in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[TokenRow]:
        """Return all tokens."""
        query = sa.select(*(_tokens.c[field.name] for field in dataclasses.fields(TokenRow)))
        return [TokenRow(**row) for row in self._database.select(query)]

    def add(self, row: TokenRow) -> None:
        """Keep a new token."""
        self._database.execute(_tokens.insert().values(**values(row, _tokens)))

    def remove(self, sha256s: Collection[str]) -> None:
        """Forget tokens."""
        self._database.execute(*(_tokens.delete().where(_tokens.c.sha256 == sha256) for sha256 in sha256s))

    def set_last_used(self, times: Mapping[str, float]) -> None:
        """Store when tokens were last used."""
        self._database.execute(
            *(
                _tokens.update().where(_tokens.c.sha256 == key).values(last_used=used)
                for key, used in times.items()
            )
        )

    def pull_back(self, now: float) -> None:
        """Set stored times later than `now` back: the clock was ahead before, or is behind since the boot.

        Otherwise a token would last longer by that difference.
        """
        created, used = _tokens.c.created, _tokens.c.last_used
        self._database.execute(
            _tokens.update()
            .where(created > now)
            .values(expires=_tokens.c.expires - created + now, created=now, last_used=None),
            _tokens.update().where(used > now).values(last_used=now),
        )
