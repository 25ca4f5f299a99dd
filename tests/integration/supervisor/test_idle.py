"""Idle agents rest and used ones do not; and a few promises about cost and races."""

import threading
import time

import pytest

from dispatcher.plugin.errors import Conflict
from dispatcher.manager.agents import idle
from dispatcher.manager.agents.lifecycle import State
from dispatcher.plugin.model import Capability
from dispatcher.plugin.names import backend_name
from dispatcher.manager.storage.rows import Desired
from tests.support.fake_backend import ALL
from tests.support.manager_world import end, gone, reach, running, until


def last(supervisor, kind, name="alice"):
    return [event for event in supervisor.queries.events(name, 50) if event.kind == kind][-1]


def test_an_idle_agent_is_suspended_with_the_reason_and_woken_by_a_request(world):
    world.app(idle_timeout=0.4)
    supervisor = world.supervisor()
    running(supervisor)
    view = reach(supervisor, "alice", "suspended", seconds=3)
    assert view.desired.value == "suspended"
    assert "it was not used for" in last(supervisor, "suspended").detail
    assert any("because it was not used" in sentence for sentence in supervisor.queries.why("alice"))
    supervisor.commands.wake("alice")
    reach(supervisor, "alice", "running")
    reach(supervisor, "alice", "suspended", seconds=3)


def test_a_stream_is_use_and_a_silent_tab_is_not(world):
    world.app(idle_timeout=0.5)
    supervisor = world.supervisor()
    for name in ("streams", "clicks", "polls", "opens"):
        running(supervisor, name)
    end_at = time.monotonic() + 1.5
    while time.monotonic() < end_at:
        supervisor.commands.record_activity("streams", {"stream": 70_000, "out": 70_000})
        supervisor.commands.record_activity("clicks", {"use": 1})
        supervisor.commands.record_activity("polls", {"poll": 100, "in": 5000, "out": 5000})
        supervisor.commands.record_activity("opens", {"idle_sockets": 3})
        time.sleep(0.05)
    states = {view.name: view.state for view in supervisor.queries.views()}
    assert states == {
        "streams": State.RUNNING,
        "clicks": State.RUNNING,
        "polls": State.SUSPENDED,
        "opens": State.SUSPENDED,
    }
    assert supervisor.queries.view("clicks").last_used is not None
    assert supervisor.queries.view("polls").last_used is None


def test_where_the_provider_cannot_suspend_it_stops(world):
    world.backend.capabilities = ALL - {Capability.SUSPEND, Capability.HIBERNATE}
    world.app(idle_timeout=0.3)
    supervisor = world.supervisor()
    running(supervisor)
    assert reach(supervisor, "alice", "stopped", seconds=3).feed_state == "asleep"


def test_a_sleeper_is_stopped_in_the_end(world):
    world.app(idle_timeout=0.3, idle_stop=0.3)
    supervisor = world.supervisor()
    running(supervisor)
    reach(supervisor, "alice", "suspended", seconds=3)
    reach(supervisor, "alice", "stopped", seconds=3)
    assert "it was asleep for" in last(supervisor, "stopped").detail


def test_work_protects_an_idle_agent_for_its_time_of_grace(world, monkeypatch):
    monkeypatch.setattr(idle, "MIN_INTERVAL", 0.05)
    monkeypatch.setattr(idle, "MEMORY", 0.3)
    world.app(idle_timeout=0.4, busy_grace=1.2)
    supervisor = world.supervisor()
    since = running(supervisor, "works").since
    running(supervisor, "rests")
    app = world.container(supervisor, "works").app
    done = threading.Event()

    def work():
        while not done.wait(0.02):
            app.cpu_seconds += 0.02

    worker = threading.Thread(target=work)
    worker.start()
    try:
        reach(supervisor, "rests", "suspended", seconds=1.2)
        assert supervisor.queries.view("works").state is State.RUNNING
        view = reach(supervisor, "works", "suspended", seconds=4)
        assert view.since - since >= 1.4
    finally:
        done.set()
        worker.join()


def test_nobody_rests_because_a_manager_was_away(world):
    world.app(idle_timeout=1.5)
    old = world.supervisor()
    running(old)
    end(old)
    time.sleep(1.7)  # people went on using it, and nobody counted
    new = world.supervisor()
    time.sleep(0.3)
    assert new.queries.view("alice").state is State.RUNNING
    reach(new, "alice", "suspended", seconds=6)


def test_when_it_was_last_used_survives_a_restart(world):
    old = world.supervisor()
    running(old)
    old.commands.record_activity("alice", {"use": 1})
    used = old.queries.view("alice").last_used
    end(old)
    assert world.supervisor().queries.view("alice").last_used == pytest.approx(used, abs=0.01)


def test_nothing_rests_while_its_backend_is_away(world):
    world.app(idle_timeout=0.3)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.down = True
    supervisor.reconciler.sweep_soon(supervisor.backends.get("fake"))
    until(lambda: supervisor.queries.view("alice").state is State.UNKNOWN)
    time.sleep(0.6)
    assert supervisor.queries.view("alice").desired.value == "running"


# --- cost


def test_a_start_costs_two_transactions(world):
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    writes = []
    save = supervisor.store.save

    def counted(rows, events=()):
        writes.append([event.kind for _, event in events])
        save(rows, events)

    supervisor.store.save = counted
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")
    assert writes == [["starting"], ["ready"]]
    handle = supervisor.store.agents()[0].handle
    assert backend_name(supervisor.installation, "alice") in handle


def test_the_handle_is_written_before_anything_is_made(world):
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", delay=0.3)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: ("ensure", "alice") in world.backend.calls)
    assert supervisor.store.agents()[0].handle
    assert not world.backend.containers
    reach(supervisor, "alice", "running")


# --- races


def test_an_event_that_comes_just_before_the_end_of_a_start_is_not_lost(world):
    """The agent dies after it was found ready and before that was written."""
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    finish = supervisor.registry.finish
    once = []

    def late(agent, operation, change):
        if change.fields.get("ready") and not once:
            once.append(1)
            world.kill(supervisor)
        return finish(agent, operation, change)

    supervisor.registry.finish = late
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: "died" in [event.kind for event in supervisor.queries.events("alice", 20)], 2)
    reach(supervisor, "alice", "running")
    assert world.container(supervisor).state == "running"


def test_a_new_agent_waits_until_what_an_unknown_one_left_is_removed(world):
    old = world.supervisor()
    running(old)
    end(old)
    import sqlalchemy as sa

    database = world.database()
    with database.write() as connection:
        connection.execute(sa.text("DELETE FROM agents"))
        connection.execute(sa.text("DELETE FROM uids"))
        connection.execute(sa.text("DELETE FROM users"))
    database.close()
    world.backend.inject("destroy", delay=0.5)
    new = world.supervisor()
    until(lambda: ("destroy", "alice") in world.backend.calls)
    with pytest.raises(Conflict, match="being removed"):
        new.commands.create("alice", app=None, password_hash="h")
    until(lambda: not world.backend.containers)
    time.sleep(0.05)
    running(new)
    assert len(world.backend.containers) == 1


def test_a_provider_s_new_options_are_used_at_once(world):
    supervisor = world.supervisor()
    running(supervisor)
    other = f"other-{world.number}"
    world.data["providers"] = {**world.data["providers"], "fake": {"backend": other}}
    changed = supervisor.apply_config(world.config())
    assert "The provider fake has new options." in changed
    from tests.support.fake_provider import FakeBackend

    try:
        running(supervisor, "bob")
        assert len(FakeBackend.named(other).containers) == 1
        supervisor.commands.remove("bob", keep_data=False)
        gone(supervisor, "bob")
    finally:
        FakeBackend.named(other).close()
