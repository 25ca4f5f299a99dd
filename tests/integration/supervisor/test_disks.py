"""Disks that are full, databases that are locked, clocks that jump: nothing is lost."""

import errno
import os
import time

import pytest

from dispatcher.plugin.errors import Unavailable
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.storage.database import DiskFull
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin.model import BackendState
from tests.support.manager_world import end, gone, reach, running, until


# --- disks, databases, clocks


def fail_writes(supervisor, error=None):
    error = error or Unavailable("The database cannot be used now", why="attempt to write a readonly database")

    def fail(*_args, **_more):
        raise error

    saved = supervisor.store.save
    supervisor.store.save = fail
    return lambda: setattr(supervisor.store, "save", saved)


def test_a_wish_that_cannot_be_written_is_refused_and_nothing_happens(world):
    supervisor = world.supervisor()
    running(supervisor)
    heal = fail_writes(supervisor)
    calls = len(world.backend.calls)
    for wish in (
        lambda: supervisor.commands.set_desired("alice", Desired.STOPPED),
        lambda: supervisor.commands.restart("alice"),
        lambda: supervisor.commands.remove("alice", keep_data=False),
        lambda: supervisor.commands.reset_data("alice"),
    ):
        with pytest.raises(Unavailable, match="readonly"):
            wish()
    assert supervisor.queries.view("alice").state is State.RUNNING
    assert len(world.backend.calls) == calls
    heal()
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")


def test_on_a_full_disk_agents_can_be_stopped_reset_and_removed(world):
    supervisor = world.supervisor()
    for name in ("alice", "bob", "carol"):
        running(supervisor, name)
    (supervisor.data.data_dir("bob") / "much").write_text("x")
    heal = fail_writes(supervisor, DiskFull("The database cannot be used now", why="database or disk is full"))
    with pytest.raises(Unavailable):
        supervisor.commands.restart("alice")
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    supervisor.commands.reset_data("bob")
    supervisor.commands.remove("carol", keep_data=False)
    reach(supervisor, "alice", "stopped")
    gone(supervisor, "carol")
    until(lambda: not (supervisor.data.data_dir("bob") / "much").exists())
    heal()
    reach(supervisor, "bob", "running")
    until(lambda: {row.name: row.desired.value for row in supervisor.store.agents()}["alice"] == "stopped")


def test_a_disk_that_is_almost_full_is_told_before_it_is(world, monkeypatch, caplog):
    monkeypatch.setattr("dispatcher.manager.agents.composition.DISK_FIRST", 0.0)
    monkeypatch.setattr("dispatcher.manager.agents.composition.DISK", 0.01)
    found = os.statvfs("/")
    low = os.statvfs_result((*found[:3], 7, 7, *found[5:]))
    monkeypatch.setattr("dispatcher.manager.files.space.os.statvfs", lambda _path: low)
    world.supervisor()
    until(lambda: "are free on the disk of" in caplog.text)
    time.sleep(0.1)
    assert caplog.text.count("are free on the disk of") == 1
    assert "dispatcher top" in caplog.text


def test_what_happens_while_nothing_can_be_written_is_written_later(world):
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", delay=0.3)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    heal = fail_writes(supervisor)
    view = reach(supervisor, "alice", "running")
    assert view.feed_state == "running"
    assert supervisor.store.agents()[0].observed is BackendState.ABSENT
    heal()
    until(lambda: supervisor.store.agents()[0].observed is BackendState.RUNNING, 3)
    until(lambda: "ready" in [event.kind for event in supervisor.queries.events("alice", 5)])


def test_nothing_is_begun_that_cannot_be_written(world):
    supervisor = world.supervisor()
    running(supervisor)
    heal = fail_writes(supervisor)
    ensured = world.backend.calls.count(("ensure", "alice"))
    world.kill(supervisor)
    until(lambda: supervisor.queries.view("alice").feed_state == "starting")
    time.sleep(0.1)
    assert world.backend.calls.count(("ensure", "alice")) == ensured
    heal()
    reach(supervisor, "alice", "running")


def test_a_locked_database_is_an_error_and_recovers(world):
    import sqlalchemy as sa

    database = world.database()

    def impatient(connection, _record):
        connection.execute("PRAGMA busy_timeout=50")

    sa.event.listen(database.engine, "connect", impatient)
    database.engine.dispose()
    supervisor = world.supervisor(database=database)
    running(supervisor)
    other = sa.create_engine(str(database.engine.url))
    with other.connect() as connection:
        connection.exec_driver_sql("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match="locked"):
            supervisor.commands.set_desired("alice", Desired.STOPPED)
        assert supervisor.queries.view("alice").state is State.RUNNING
        connection.exec_driver_sql("ROLLBACK")
    other.dispose()
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space on its disk"),
        (errno.EROFS, "mount its file system writable"),
        (errno.EACCES, "check that it exists, and its owner and mode"),
    ],
)
def test_a_directory_that_cannot_be_used_fails_the_start_with_the_reason(world, number, fix):
    world.app(max_restarts=5)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    prepare = supervisor.data.prepare

    def fail(*_agent):
        raise OSError(number, os.strerror(number), "/data")

    supervisor.data.prepare = fail
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed")
    assert os.strerror(number) in view.failure.why
    assert view.failure.fix == fix
    supervisor.data.prepare = prepare
    reach(supervisor, "alice", "running", seconds=3)


def test_a_jump_of_the_wall_clock_moves_nothing(world, monkeypatch):
    world.app(idle_timeout=3600)
    supervisor = world.supervisor()
    view = running(supervisor)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    supervisor.idle_monitor.check()
    supervisor.reconcile()
    time.sleep(0.1)
    assert supervisor.queries.view("alice").state is State.RUNNING
    end(supervisor)
    new = world.supervisor()
    new.idle_monitor.check()
    assert new.queries.view("alice").state is State.RUNNING
    assert new.queries.view("alice").since == pytest.approx(view.since, abs=0.01)
