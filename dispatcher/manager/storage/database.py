"""The database: engine, schema version, transactions.

Tables are declared on `metadata` by the modules that own them (`tables`, `auth`).  SQLite runs in WAL
mode; writers take turns through one lock, so that "database is locked" is not an everyday event.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dispatcher.plugin.errors import ConfigError, Unavailable

SCHEMA_VERSION = 2
metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


class Database:
    """One database of one installation.

    :param url: SQLAlchemy URL; ``sqlite:///PATH`` gets WAL mode and mode 0600.
    :raises ConfigError: the URL is wrong or the schema is of a newer version.
    :raises Unavailable: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self.engine = sa.create_engine(url, pool_size=20, max_overflow=20)
        except sa.exc.ArgumentError as error:
            raise ConfigError("manager.database is not a SQLAlchemy URL", why=str(error)) from error
        except ImportError as error:
            raise ConfigError(
                "manager.database needs a driver that is not installed", why=str(error), fix="install it"
            ) from error
        self._write_lock = threading.RLock()
        self.sqlite = self.engine.dialect.name == "sqlite"
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            path = self.engine.url.database
            if path and path != ":memory:":
                try:
                    Path(path).touch(mode=0o600, exist_ok=True)
                except OSError as error:
                    raise Unavailable(
                        f"Cannot open the database {path}",
                        why=error.strerror or str(error),
                        fix="check that its directory exists, has space and is writable",
                    ) from error

    def open(self) -> None:
        """Create what is missing and check the schema's version.

        :raises ConfigError: it is not a database, or a newer release's; :raises Unavailable: not usable now.
        """
        try:
            self._open()
        except Unavailable as error:
            # Only here: later errors may be shown to users, who must not see the path.
            where = self.engine.url.database if self.sqlite else self.engine.url.render_as_string()
            raise Unavailable(f"The database {where} cannot be used now", why=error.why, fix=error.fix) from error
        except sa.exc.DatabaseError as error:
            raise ConfigError(
                f"{self.engine.url.database} cannot be used as a database",
                why=str(error.orig),
                fix="restore a copy of it, or choose another manager.database",
            ) from error

    def _open(self) -> None:
        with self.write() as connection:
            metadata.create_all(connection)
            found = connection.execute(sa.select(meta.c.value).where(meta.c.key == "schema")).scalar()
            if found is None:
                connection.execute(meta.insert().values(key="schema", value=str(SCHEMA_VERSION)))
            elif int(found) > SCHEMA_VERSION:
                raise ConfigError(
                    f"The database has schema {found}",
                    why=f"this version supports schema {SCHEMA_VERSION}",
                    fix="run the newer release that wrote it",
                )
            else:
                self._migrate(connection, int(found))

    @staticmethod
    def _migrate(connection: sa.Connection, found: int) -> None:
        """Bring a database of an earlier schema to `SCHEMA_VERSION`."""
        if found < 2 and "disabled" in {column["name"] for column in sa.inspect(connection).get_columns("users")}:
            connection.execute(sa.text("ALTER TABLE users DROP COLUMN disabled"))
        if found < SCHEMA_VERSION:
            connection.execute(meta.update().where(meta.c.key == "schema").values(value=str(SCHEMA_VERSION)))

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Yield a connection inside a transaction; writers take turns.

        :raises Unavailable: the disk is full, the file is read-only or locked by another program.
        """
        with self._write_lock:
            try:
                with self.engine.begin() as connection:
                    yield connection
            except sa.exc.OperationalError as error:
                raise _unavailable(error) from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Yield a connection for reading; never waits for writers.

        :raises Unavailable: as `write`.
        """
        try:
            with self.engine.connect() as connection:
                yield connection
        except sa.exc.OperationalError as error:
            raise _unavailable(error) from error

    def select(self, query: sa.Select[Any] | sa.CompoundSelect[Any]) -> Sequence[sa.RowMapping]:
        """Return the rows that a query finds.

        :raises Unavailable: as `write`.
        """
        with self.read() as connection:
            return connection.execute(query).mappings().all()

    def execute(self, *statements: sa.Executable) -> int:
        """Execute statements in one transaction; return the number of rows that the last one changed.

        :raises Unavailable: as `write`.
        """
        changed = 0
        with self.write() as connection:
            for statement in statements:
                changed = connection.execute(statement).rowcount
        return changed

    def meta(self, key: str, default: str) -> str:
        """Return the value kept under `key`; `default` is stored the first time."""
        with self.write() as connection:
            value = connection.execute(sa.select(meta.c.value).where(meta.c.key == key)).scalar()
            if value is None:
                connection.execute(meta.insert().values(key=key, value=default))
                return default
            return str(value)

    def set_meta(self, key: str, value: str) -> None:
        """Keep `value` under `key`."""
        self.execute(meta.delete().where(meta.c.key == key), meta.insert().values(key=key, value=value))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _configure_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _unavailable(error: sa.exc.OperationalError) -> Unavailable:
    return Unavailable(
        "The database cannot be used now",
        why=str(error.orig),
        fix="check that its disk has space and is writable",
        retry_after=5,
    )
