"""A database that cannot be used is said in one error, and nothing of it is touched."""

from __future__ import annotations

import sqlite3
import stat

import pytest
import sqlalchemy as sa

from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.manager.storage.database import SCHEMA_VERSION, Database


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
        ("nonsense", ConfigError, "no SQLAlchemy URL"),
        ("nodialect://x", ConfigError, "no SQLAlchemy URL"),
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


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "x.db").mkdir()
    with pytest.raises((Unavailable, ConfigError)) as caught:
        opened(f"sqlite:///{tmp_path}/x.db")
    assert f"{tmp_path}/x.db" in str(caught.value)
    assert "space" in caught.value.fix


def test_a_newer_schema_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    opened(url)
    with sqlite3.connect(tmp_path / "x.db") as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(SCHEMA_VERSION + 1),))
    connection.close()
    with pytest.raises(ConfigError) as caught:
        opened(url)
    assert "newer release" in caught.value.fix


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


def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path):
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
