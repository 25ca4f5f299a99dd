"""A database that cannot be used is said in one error, and nothing of it is touched."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat

import pytest
import sqlalchemy as sa

from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.manager.storage.database import RESERVE, SCHEMA_VERSION, Database, DiskFull
from dispatcher.manager.files.space import disk_fix


def opened(url):
    database = Database(url)
    try:
        database.open()
    finally:
        database.close()
    return database


def test_a_new_one_is_private_and_opens_again(tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    opened(url)
    assert stat.S_IMODE((tmp_path / "x.db").stat().st_mode) == 0o600
    opened(url)


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("nonsense", ConfigError, "not a SQLAlchemy URL"),
        ("nodialect://x", ConfigError, "nodialect is not supported"),
        ("sqlite+nodriver://x", ConfigError, "not a SQLAlchemy URL"),
        ("mysql://x", ConfigError, "mysql is not supported"),
        ("oracle+oracledb://x", ConfigError, "use sqlite:///PATH or postgresql"),
        ("sqlite:////nonexistent/x.db", Unavailable, "Cannot open the database"),
    ],
)
def test_urls_that_cannot_be(url, error, words):
    with pytest.raises(error) as caught:
        opened(url)
    assert words in str(caught.value)


def test_a_driver_that_is_missing(monkeypatch):
    def missing(*_args, **_more):
        raise ModuleNotFoundError("No module named 'psycopg2'")

    monkeypatch.setattr(sa, "create_engine", missing)
    with pytest.raises(ConfigError) as caught:
        Database("postgresql://x")
    assert "psycopg2" in caught.value.why


def test_a_file_that_is_no_database_stays_as_it_is(tmp_path):
    path = tmp_path / "x.db"
    path.write_bytes(b"precious notes, no database at all" * 100)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        opened(f"sqlite:///{path}")
    assert "x.db" in caught.value.what
    assert path.read_bytes() == before


def test_the_error_names_a_database_that_cannot_be_opened(tmp_path):
    (tmp_path / "x.db").mkdir()
    with pytest.raises((Unavailable, ConfigError)) as caught:
        opened(f"sqlite:///{tmp_path}/x.db")
    assert f"{tmp_path}/x.db" in str(caught.value)
    assert "check that its directory" in caught.value.fix


def test_space_is_reserved_once_and_kept(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    before = (tmp_path / "x.db").stat().st_size
    for _ in range(2):
        database.reserve()
        sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir()) if not path.name.endswith("-shm")]
        assert all(RESERVE <= size < RESERVE + (1 << 20) for size in sizes), sizes
    assert before < 1 << 20
    database.set_meta("key", "value")
    assert database.meta("key", "") == "value"
    database.close()


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("database or disk is full", "free some space on its disk"),
        ("database is locked", "end the other program that uses it"),
        ("attempt to write a readonly database", "make it writable for the manager's user"),
        ("server closed the connection unexpectedly", "check that its server answers"),
    ],
)
def test_an_error_blames_the_disk_only_when_it_is_the_disk(tmp_path, said, fix):
    database = Database(f"sqlite:///{tmp_path}/x.db")
    with pytest.raises(Unavailable) as caught, database.write():
        raise sa.exc.OperationalError("INSERT", None, sqlite3.OperationalError(said))
    assert (caught.value.why, caught.value.fix) == (said, fix)
    database.close()


def test_a_newer_schema_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    opened(url)
    with sqlite3.connect(tmp_path / "x.db") as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(SCHEMA_VERSION + 1),))
    connection.close()
    with pytest.raises(ConfigError) as caught:
        opened(url)
    assert "newer release" in caught.value.fix


OLD = """
CREATE TABLE meta (key VARCHAR(64) NOT NULL, value TEXT NOT NULL, PRIMARY KEY (key));
INSERT INTO meta VALUES ('schema', '1'), ('installation', 'abcd');
CREATE TABLE users (id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, name VARCHAR(255) NOT NULL, password_hash TEXT,
  created FLOAT NOT NULL, disabled BOOLEAN NOT NULL, UNIQUE (name));
INSERT INTO users VALUES (7, 'alice', 'hash', 1.5, 0);
CREATE TABLE agents (id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, name VARCHAR(300) NOT NULL,
  user_id INTEGER NOT NULL, app VARCHAR(32) NOT NULL, provider VARCHAR(32) NOT NULL, uid INTEGER NOT NULL,
  created FLOAT NOT NULL, version INTEGER NOT NULL, desired VARCHAR(16) NOT NULL, keep_data BOOLEAN NOT NULL,
  pending VARCHAR(16) NOT NULL, handle TEXT NOT NULL, observed VARCHAR(16) NOT NULL, observed_at FLOAT,
  ready BOOLEAN NOT NULL, endpoint TEXT NOT NULL, owner_uid INTEGER, started_at FLOAT,
  spec_hash VARCHAR(64) NOT NULL, exit_reason TEXT NOT NULL, operation VARCHAR(16) NOT NULL,
  step VARCHAR(64) NOT NULL, operation_since FLOAT, since FLOAT NOT NULL, failure JSON, attempts JSON,
  retry_at FLOAT, move JSON, last_used FLOAT, UNIQUE (name), FOREIGN KEY(user_id) REFERENCES users (id));
INSERT INTO agents (id, name, user_id, app, provider, uid, created, version, desired, keep_data, pending, handle,
  observed, ready, endpoint, spec_hash, exit_reason, operation, step, since, failure, attempts, move) VALUES
  (3, 'alice', 7, 'demo', 'fake', 1000, 1.5, 9, 'running', 0, 'restart', '', 'stopped', 0, '', '', '', 'start',
  '', 2.0, '{"what": "w", "why": "y", "fix": "f", "log": ["a"], "time": 1.0, "final": true}', '[1.0, 2.0]', 'null');
CREATE TABLE sessions (sha256 VARCHAR(64) NOT NULL PRIMARY KEY, user VARCHAR(255) NOT NULL);
CREATE INDEX ix_sessions_user ON sessions (user);
INSERT INTO sessions VALUES ('s', 'alice');
CREATE TABLE devices (sha256 VARCHAR(64) NOT NULL PRIMARY KEY, user VARCHAR(255) NOT NULL, last_used FLOAT NOT NULL);
"""


def test_a_database_of_schema_1_opens_with_its_users_and_agents(tmp_path):
    from dispatcher.manager.storage.agents import Store
    from dispatcher.manager.storage.auth import AuthStore
    from dispatcher.manager.storage.rows import AgentRow, Failure
    from dispatcher.plugin.model import BackendState

    with sqlite3.connect(tmp_path / "x.db") as connection:
        connection.executescript(OLD)
    connection.close()
    for _ in range(2):  # the second time there is nothing to do
        database = Database(f"sqlite:///{tmp_path}/x.db")
        database.open()
        store = Store(database)
        auth = AuthStore(database)  # sessions were of names, which says too little
        assert auth.sessions() == [] and not auth.has_device("d", 7)
        user, (agent,) = store.get_user("alice"), store.agents()
        assert (user.id, user.password_hash, user.created) == (7, "hash", 1.5)
        assert (user.source, user.subject, user.groups) == (None, None, ())
        assert agent.failure == Failure(what="w", why="y", fix="f", log=("a",), time=1.0, final=True)
        assert (agent.desired.name, agent.pending.name, agent.operation.name) == ("RUNNING", "RESTART", "START")
        assert (agent.observed, agent.attempts, agent.move) == (BackendState.STOPPED, (1.0, 2.0), None)
        assert database.meta("schema", "") == str(SCHEMA_VERSION)
        store.save([agent])  # the same version: nothing is written
        assert store.agents() == [agent]
        database.close()
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    new = AgentRow(
        id=0,
        version=0,
        name="bob",
        user="bob",
        user_id=0,
        app="demo",
        provider="fake",
        uid=1,
        created=1.0,
        since=1.0,
    )
    assert Store(database).create(new, password_hash="h", allocated=False, events=[]).user_id == 8
    database.close()


def test_a_database_of_schema_3_keeps_its_sessions(tmp_path):
    from dispatcher.manager.storage.auth import AuthStore, External, SessionRow, Visitor

    row = SessionRow(sha256="a" * 64, user="alice", user_id=7, agent="alice", created=1.0, last_used=1.0)
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    AuthStore(database).add_session(row, Visitor(address="192.0.2.1"))
    database.close()
    with sqlite3.connect(tmp_path / "x.db") as connection:
        for name, columns in {
            "users": ("source", "subject", "groups", "departed"),
            "sessions": ("source", "external", "kept"),
        }.items():
            for column in columns:
                connection.execute(f"ALTER TABLE {name} DROP COLUMN {column}")
        connection.execute("INSERT INTO users (id, name, password_hash, created) VALUES (7, 'alice', 'hash', 1.5)")
        connection.execute("UPDATE meta SET value = '3' WHERE key = 'schema'")
    connection.close()
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    store = AuthStore(database)
    assert store.sessions() == [row]
    assert store.external(row.sha256) == External()
    other = SessionRow(sha256="b" * 64, user="alice", user_id=7, agent="alice", created=1.0, last_used=1.0)
    store.add_session(other, Visitor(), external=External(source="oidc.uni", external="s1", kept="k"))
    assert store.sessions_from("oidc.uni", "s1") == [other.sha256]
    assert store.external(other.sha256).kept == "k"
    database.close()


def test_a_lock_of_another_program_is_waited_for_then_said(tmp_path, monkeypatch):
    from dispatcher.manager.storage import database as module

    real = module._configure_sqlite

    def impatient(connection, record):
        real(connection, record)
        connection.execute("PRAGMA busy_timeout=50")

    monkeypatch.setattr(module, "_configure_sqlite", impatient)
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    other = sqlite3.connect(tmp_path / "x.db")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as caught:
        database.set_meta("a", "b")
    assert "locked" in caught.value.why
    assert caught.value.retry_after
    other.rollback()
    other.close()
    database.set_meta("a", "b")
    assert database.meta("a", "") == "b"
    database.close()


def test_a_full_disk_is_reported_and_written_data_stays(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    database.set_meta("before", "kept")
    with database.write() as connection:
        pages = connection.execute(sa.text("PRAGMA page_count")).scalar()
    database.engine.dispose()

    @sa.event.listens_for(database.engine, "connect")
    def small(connection, _record):
        connection.execute(f"PRAGMA max_page_count={pages}")

    with pytest.raises(Unavailable) as caught:
        database.set_meta("much", "x" * 1_000_000)
    assert "full" in caught.value.why
    assert database.meta("before", "") == "kept"
    database.close()


def test_a_copy_of_the_file_alone_has_what_was_written_before_the_last_checkpoint(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    database.reserve()
    database.set_meta("early", "there")
    database.checkpoint()
    (tmp_path / "copy.db").write_bytes((tmp_path / "x.db").read_bytes())
    database.close()
    copy = Database(f"sqlite:///{tmp_path}/copy.db")
    copy.open()
    assert copy.meta("early", "") == "there"
    copy.close()


def test_space_is_reserved_without_a_log_too(tmp_path):
    """Where SQLite cannot share memory, on some network file systems, it uses another journal."""
    database = Database(f"sqlite:///{tmp_path}/x.db")

    def without_log(connection, _record):
        connection.execute("PRAGMA journal_mode=DELETE")

    sa.event.listen(database.engine, "connect", without_log)
    database.open()
    for _ in range(2):
        database.reserve()
    assert not (tmp_path / "x.db-wal").exists()
    assert min((tmp_path / name).stat().st_size for name in ("x.db", "x.db-reserve")) >= RESERVE
    database.close()


@pytest.mark.parametrize(
    ("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EROFS, False)]
)
def test_a_reserve_that_cannot_be_written_blames_a_full_disk_only_when_it_is_full(
    tmp_path, monkeypatch, number, full
):
    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(Unavailable) as caught:
        database.reserve()
    assert isinstance(caught.value, DiskFull) is full
    assert caught.value.fix == disk_fix(OSError(number, ""))
    database.close()
