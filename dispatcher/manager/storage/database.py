"""The database: engine, schema version, transactions.

Tables are declared on `metadata` by the modules that own them (`tables`, `auth`).  SQLite runs in WAL
mode; writers take turns through one lock, so that "database is locked" is not an everyday event.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dispatcher.manager.files.space import disk_fix, free_space
from dispatcher.plugin.errors import ConfigError, Unavailable

SCHEMA_VERSION = 4
TESTED = ("sqlite", "postgresql")
RECYCLE = 1800.0  # seconds after which a connection to a database server is replaced
RESERVE = 8 << 20  # bytes kept for a full disk: in an SQLite file, in its log, and in a file beside it
SMALLEST = 1 << 16  # bytes: with less free space a disk is full
_FULL = ("is full", "No space left")  # SQLite; PostgreSQL
_FIXES = {  # by what SQLite says, and PostgreSQL
    "read-only": "set manager.database to the primary server, and check its disk: a full one makes some read-only",
    "locked": "end the other program that uses it",
    "readonly": "make it writable for the manager's user",
    "unable to open": "check that its directory exists and is writable",
    "disk I/O": "check the disk: the kernel's log names its errors",
}
#: The database does not answer; other errors are faults of a statement.
_UNUSABLE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)
metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


class DiskFull(Unavailable):
    """The database cannot be written, as its disk is full."""


class Database:
    """One database of one installation.

    :param url: SQLAlchemy URL; ``sqlite:///PATH`` gets WAL mode and mode 0600.
    :raises ConfigError: the URL is wrong or the schema is of a newer version.
    :raises Unavailable: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.engine.make_url(url)
            kind = parsed.get_backend_name()
            if kind not in TESTED:
                raise ConfigError(
                    f"manager.database: {kind} is not supported",
                    why=f"tested are: {', '.join(TESTED)}",
                    fix="use sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME",
                )
            if parsed.drivername.startswith("postgresql+psycopg"):  # not a standby, which can only be read
                parsed = parsed.update_query_dict({"target_session_attrs": "read-write"} | dict(parsed.query))
            # A connection that the server has closed (a restart, a firewall) is replaced before it is used.
            self.engine = sa.create_engine(
                parsed, pool_size=20, max_overflow=20, pool_pre_ping=kind != "sqlite", pool_recycle=RECYCLE
            )
        except sa.exc.ArgumentError as error:
            raise ConfigError("manager.database is not a SQLAlchemy URL", why=str(error)) from error
        except ImportError as error:
            raise ConfigError(
                "manager.database needs a driver that is not installed",
                why=str(error),
                fix=f"{sys.executable} -m pip install 'agent-dispatcher[postgresql]'",
            ) from error
        self._write_lock = threading.RLock()
        self._written = False  # since the last checkpoint
        self.sqlite = self.engine.dialect.name == "sqlite"
        self._file: Path | None = None
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            path = self.engine.url.database
            if path and path != ":memory:":
                self._file = Path(path)
                try:
                    self._file.touch(mode=0o600, exist_ok=True)
                except OSError as error:
                    raise Unavailable(
                        f"Cannot open the database {path}",
                        why=error.strerror or str(error),
                        fix=disk_fix(error),
                    ) from error

    def open(self) -> None:
        """Create what is missing and check the schema's version.

        :raises ConfigError: it is not a database, or a newer release's; :raises Unavailable: not usable now.
        """
        try:
            try:
                self._open()
            except DiskFull:
                if self._file is None:
                    raise
                self.engine.dispose()
                self._reserve_file(self._file).unlink(missing_ok=True)
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
        if found < 3:
            for name in ("sessions", "devices"):  # of names: a row may be of an earlier user of its name
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {name}"))
            metadata.create_all(connection)
        if found < 4:
            added = {
                "users": ("source VARCHAR(128)", "subject VARCHAR(255)", "groups JSON", "departed FLOAT"),
                "sessions": ("source VARCHAR(128)", "external VARCHAR(255)", "kept TEXT"),
                "kept": ("source VARCHAR(128)", "subject VARCHAR(255)"),
            }
            for name, columns in added.items():
                present = {column["name"] for column in sa.inspect(connection).get_columns(name)}
                for column in columns:
                    if column.partition(" ")[0] not in present:
                        connection.execute(sa.text(f"ALTER TABLE {name} ADD COLUMN {column}"))
        if found < SCHEMA_VERSION:
            connection.execute(meta.update().where(meta.c.key == "schema").values(value=str(SCHEMA_VERSION)))

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Yield a connection inside a transaction; writers take turns.

        :raises Unavailable: the disk is full, the file is read-only or locked by another program, the database
            server does not answer.
        """
        with self._write_lock:
            try:
                with self.engine.begin() as connection:
                    self._written = True
                    yield connection
            except _UNUSABLE as error:
                raise self._unavailable(error) from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Yield a connection for reading; never waits for writers.

        :raises Unavailable: as `write`.
        """
        try:
            with self.engine.connect() as connection:
                yield connection
        except _UNUSABLE as error:
            raise self._unavailable(error) from error

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

    def reserve(self) -> None:
        """Keep room in SQLite's files, so that they can be written when the disk is full; cheap when there is.

        Free pages stay in the file, and the write-ahead log keeps its size: it is written again from its start.
        The log is deleted when the manager ends; a file beside it is the reserve for the next start.

        :raises DiskFull: there is no space; :raises Unavailable: the file beside it cannot be written.
        """
        if self._file is None:
            return
        log = self._file.with_name(self._file.name + "-wal")
        with self.read() as connection:
            pages = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
            size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
        try:
            logged = log.stat().st_size
        except FileNotFoundError:  # SQLite uses another journal where the file system cannot share memory
            logged = RESERVE
        if pages * size < RESERVE // 2 or logged < RESERVE // 2:
            with self.write() as connection:
                connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS reserve (bytes BLOB)")
                connection.exec_driver_sql("INSERT INTO reserve VALUES (zeroblob(?))", (RESERVE,))
            with self.write() as connection:
                connection.exec_driver_sql("DROP TABLE reserve")
            with self.read() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
        try:
            with open(os.open(self._reserve_file(self._file), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE)
        except OSError as error:
            failure = DiskFull if error.errno in {errno.ENOSPC, errno.EDQUOT} else Unavailable
            raise failure(
                "No space can be reserved for the database", why=str(error), fix=disk_fix(error)
            ) from error

    def checkpoint(self) -> None:
        """Copy what was written since the last time from SQLite's log to its file."""
        if self._file and self._written:
            self._written = False
            with self.read() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    @staticmethod
    def _reserve_file(database: Path) -> Path:
        return database.with_name(database.name + "-reserve")

    def _unavailable(self, error: sa.exc.SQLAlchemyError) -> Unavailable:
        what, why = "The database cannot be used now", str(getattr(error, "orig", error)).strip()
        full = any(words in why for words in _FULL)
        if "disk I/O" in why and self._file and free_space(self._file.parent) < SMALLEST:
            full, why = True, "the disk is full"  # SQLite's memory map cannot grow
        if full:
            return DiskFull(what, why=why, fix="free some space on its disk", retry_after=5)
        if "read-only" in why:  # after a failover the pool has connections to what was the primary server
            self.engine.dispose()
        fixes = [fix for words, fix in _FIXES.items() if words in why]
        return Unavailable(what, why=why, fix=(*fixes, "check that its server answers")[0], retry_after=5)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _configure_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
