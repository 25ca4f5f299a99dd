"""The manager's rows in a PostgreSQL server, and a server that restarts."""

import dataclasses
import os
import pwd
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from dispatcher.manager.storage.agents import Store
from dispatcher.manager.storage.rows import AgentRow, CopyRow, KeptRow
from dispatcher.manager.storage.auth import Account, AuthStore, SessionRow, Visitor
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.rows import Desired
from dispatcher.manager.storage.tokens import TokenRow, TokenStore
from dispatcher.plugin.errors import Conflict, Unavailable
from dispatcher.plugin.model import AgentEvent
from tests.support.postgresql import programs

pytestmark = pytest.mark.postgresql


class Server:
    """A server of its own, that listens on a Unix socket; it refuses to run as root."""

    def __init__(self, home):
        self.home = home
        self.programs = programs()
        self.user = {"user": pwd.getpwnam("nobody").pw_uid} if os.geteuid() == 0 else {}
        if self.user:
            os.chown(home, self.user["user"], -1)
        self.run("initdb", "-D", home / "data", "-U", "dispatcher", "-A", "trust", "--no-sync")
        self.start()

    def run(self, program, *arguments):
        command = [self.programs / program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, **self.user)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        options = f"-k {self.home} -c listen_addresses='' -c fsync=off"
        self.run("pg_ctl", "-D", self.home / "data", "-l", self.home / "log", "-w", "-o", options, "start")

    def stop(self):
        self.run("pg_ctl", "-D", self.home / "data", "-w", "-m", "immediate", "stop")

    @property
    def url(self):
        return f"postgresql+psycopg://dispatcher@/postgres?host={self.home}"


@pytest.fixture(scope="module")
def server():
    home = Path("/tmp") / f"dispatcher-pg-{os.getpid()}"  # the path of a socket must be short
    home.mkdir(mode=0o700)
    server = Server(home)
    yield server
    server.stop()
    shutil.rmtree(home)


@pytest.fixture
def database(server):
    made = Database(server.url)
    made.open()
    yield made
    with made.engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    made.close()


TIME = 1_900_000_000.123456


def test_rows_come_back_as_they_were(database):
    store, auth = Store(database), AuthStore(database)
    row = AgentRow(
        id=0,
        version=1,
        name="alice",
        user="alice",
        user_id=0,
        app="demo",
        provider="fake",
        uid=200_000,
        created=TIME,
        since=TIME,
    )
    made = store.create(row, password_hash="hash", allocated=True, events=[])
    assert store.agents() == [made]
    with pytest.raises(Conflict):
        store.create(row, password_hash="hash", allocated=False, events=[])
    newer = AgentRow(
        **{name: getattr(made, name) for name in made.__slots__} | {"version": 2, "desired": Desired.RUNNING}
    )
    event = AgentEvent(time=TIME, agent="alice", user="alice", app="demo", kind="ready", detail="")
    store.save([newer], [(made.id, event)])
    store.save([made])
    assert store.agents() == [newer]
    assert store.events(made.id, 5) == [event]
    store.add_copy(CopyRow(id=0, agent="alice", provider="old", directory="d", handle="", time=TIME), newer)
    assert store.copies("alice")[0].time == TIME
    session = SessionRow(
        sha256="0" * 64, user="alice", user_id=made.user_id, agent="alice", created=TIME, last_used=TIME
    )
    auth.add_session(session, Visitor(address="192.0.2.1", user_agent="Browser"), device="1" * 64)
    assert auth.sessions() == [session]
    assert auth.knows_device("1" * 64, made.user_id, TIME)
    tokens = TokenStore(database)
    token = TokenRow(
        sha256="2" * 64, user="alice", user_id=made.user_id, service=None, scopes=("read", "app"), note="n",
        created=TIME, expires=TIME + 5,
    )  # fmt: skip
    tokens.add(token)
    tokens.set_last_used({token.sha256: TIME})
    assert tokens.all() == [dataclasses.replace(token, last_used=TIME)]
    tokens.pull_back(TIME - 1000)
    assert [row.expires for row in tokens.all()] == [pytest.approx(TIME - 995)]
    tokens.remove([token.sha256])
    assert tokens.all() == []
    auth.keep({"name:alice": Account(1.5, TIME, TIME)})
    assert auth.accounts() == {"name:alice": Account(1.5, TIME, TIME)}
    kept = KeptRow(agent="alice", uid=200_000, app="demo", provider="fake", handle="", time=TIME)
    assert store.remove(newer, kept=kept, events=[])
    assert not auth.has_device("1" * 64, made.user_id)
    assert store.kept("alice") == dataclasses.replace(kept, source="local")
    database.reserve()
    database.checkpoint()


def test_a_server_that_restarts_is_noticed_by_nobody(server, database):
    database.set_meta("before", "there")
    server.stop()
    with pytest.raises(Unavailable) as caught:
        database.meta("before", "")
    assert caught.value.fix == "check that its server answers"
    server.start()
    assert database.meta("before", "") == "there"
    server.stop()
    server.start()
    assert database.meta("before", "") == "there"
    database.set_meta("after", "there")


def test_a_server_that_becomes_read_only_is_told_and_needs_no_restart(server, database):
    """As managed servers do when their disk is full."""
    database.set_meta("before", "there")

    def read_only(setting):
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"ALTER SYSTEM SET default_transaction_read_only = {setting}"))
            connection.execute(sa.text("SELECT pg_reload_conf()"))

    read_only("on")
    try:
        with pytest.raises(Unavailable) as caught:
            for _ in range(100):  # the server reads its configuration soon
                database.set_meta("meanwhile", "lost")
        assert "read-only" in caught.value.why and "primary" in caught.value.fix
        with pytest.raises(Unavailable) as caught:
            database.meta("before", "")
        assert "read-only" in caught.value.why
    finally:
        server.run("psql", "-h", server.home, "-U", "dispatcher", "-d", "postgres", "-c",
                   "SET default_transaction_read_only = off", "-c",
                   "ALTER SYSTEM RESET default_transaction_read_only", "-c", "SELECT pg_reload_conf()")  # fmt: skip
    end = time.monotonic() + 20
    while True:
        try:
            database.set_meta("after", "there")
            break
        except Unavailable:
            assert time.monotonic() < end
    assert database.meta("before", "") == "there"


def test_a_standby_is_not_used_and_the_manager_goes_on_with_its_promotion(server, database):
    database.set_meta("before", "there")
    server.stop()
    (server.home / "data/standby.signal").touch()
    server.start()
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            database.set_meta("meanwhile", "lost")
        assert "read-only" in caught.value.why and "primary" in caught.value.fix
    with pytest.raises(Unavailable, match="cannot be used now"):
        Database(server.url).open()
    server.run("pg_ctl", "-D", server.home / "data", "-w", "promote")
    assert database.meta("before", "") == "there"
    database.set_meta("after", "there")
