"""Backends that are away, and what happens behind the manager's back: known agents stay what they were."""

import time

import pytest

from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.manager.agents.lifecycle import State
from dispatcher.plugin.model import Capability
from dispatcher.manager.storage.rows import Desired
from tests.support.fake_backend import ALL
from tests.support.manager_world import end, reach, running, until


# --- backends that are away


def test_an_outage_makes_states_unknown_and_then_what_they_are(world):
    supervisor = world.supervisor()
    running(supervisor)
    running(supervisor, "bob")
    running(supervisor, "carol")
    supervisor.commands.set_desired("carol", Desired.STOPPED)
    reach(supervisor, "carol", "stopped")
    backend = supervisor.backends.get("fake")
    world.backend.down = True
    supervisor.reconciler.sweep_soon(backend)
    until(lambda: supervisor.queries.view("alice").state is State.UNKNOWN)
    view = supervisor.queries.view("alice")
    assert (view.feed_state, view.reachable) == ("running", False)
    assert view.observed_at < time.time() + 1
    assert "does not answer" in view.detail
    assert supervisor.queries.view("carol").state is State.STOPPED
    assert any("does not answer since" in sentence for sentence in supervisor.queries.why("alice"))
    assert not next(found for found in supervisor.queries.providers() if found["name"] == "fake")["usable"]
    world.kill(supervisor, "bob")
    world.backend.down = False
    supervisor.reconciler.sweep_soon(backend)
    reach(supervisor, "alice", "running")
    until(lambda: "died" in [event.kind for event in supervisor.queries.events("bob", 20)])
    reach(supervisor, "bob", "running")
    kinds = [event.kind for event in supervisor.queries.events("alice", 20)]
    assert kinds[-2:] == ["unreachable", "reachable"]


def test_one_backend_s_outage_does_not_concern_another(world):
    world.data["apps"]["far"] = {"provider": "away", "away": {}}
    supervisor = world.supervisor()
    supervisor.commands.create("bob", app="far", password_hash="h")
    supervisor.commands.set_desired("bob", Desired.RUNNING)
    reach(supervisor, "bob", "running")
    world.away.down = True
    supervisor.reconciler.sweep_soon(supervisor.backends.get("away"))
    until(lambda: supervisor.queries.view("bob").state is State.UNKNOWN)
    supervisor.commands.create("alice", app="demo", password_hash="h")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")


def test_a_start_during_an_outage_is_tried_again_when_it_is_over(world):
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.down = True
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed")
    assert "does not answer" in view.failure.what
    world.backend.down = False
    supervisor.reconciler.sweep_soon(supervisor.backends.get("fake"))
    reach(supervisor, "alice", "running", seconds=2)
    assert supervisor.registry.find("alice").row.attempts == ()


def test_a_manager_that_boots_during_an_outage_changes_nothing_and_goes_on_serving(world):
    old = world.supervisor()
    running(old)
    end(old)
    world.backend.down = True
    new = world.supervisor()
    view = new.queries.view("alice")
    assert (view.state, view.feed_state, view.reachable) == (State.UNKNOWN, "running", False)
    assert view.observed_at is not None
    world.backend.down = False
    app = world.container(new).app
    new.reconciler.sweep_soon(new.backends.get("fake"))
    reach(new, "alice", "running")
    assert world.container(new).app is app


def test_one_failed_poll_in_a_start_is_no_failure(world):
    world.app(fake={"endpoint": "unix"})
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject("observe", error=Unavailable("once"), times=1)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")


def test_a_plugin_that_is_gone_leaves_its_agents_known(world):
    old = world.supervisor()
    running(old)
    end(old)
    plugins = world.plugins

    def without_fake():
        found = plugins()
        found._entries.pop("fake")
        return found

    world.plugins = without_fake
    world.data["apps"] = {"demo": {"provider": "away", "away": {}}}
    del world.data["providers"]["fake"]
    new = world.supervisor()
    view = new.queries.view("alice")
    assert (view.state, view.feed_state) == (State.UNKNOWN, "running")
    assert any("no plugin" in sentence for sentence in new.queries.why("alice"))
    assert next(found for found in new.queries.providers() if found["name"] == "fake")["usable"] is False
    new.commands.create("bob", app=None, password_hash="h")
    new.commands.set_desired("bob", Desired.RUNNING)
    reach(new, "bob", "running")
    with pytest.raises(ConfigError, match="no plugin"):
        new.queries.check_provider("fake", None) and new.backends.get("fake").provider


def test_a_watch_that_cannot_be_had_is_tried_again(world):
    world.data["manager"]["reconcile_interval"] = 0.2
    world.backend.inject("watch", error=RuntimeError("no events"), times=1)
    supervisor = world.supervisor()
    running(supervisor)
    until(lambda: world.backend._watchers)
    world.kill(supervisor)
    until(lambda: "died" in [event.kind for event in supervisor.queries.events("alice", 20)])


def test_without_events_the_reconciler_finds_the_dead(world):
    world.backend.capabilities = ALL - {Capability.EVENTS}
    world.data["manager"]["reconcile_interval"] = 0.2
    supervisor = world.supervisor()
    running(supervisor)
    world.kill(supervisor)
    until(lambda: "died" in [event.kind for event in supervisor.queries.events("alice", 20)], 2)
    reach(supervisor, "alice", "running")


def test_what_somebody_started_behind_our_back_is_stopped(world):
    world.data["manager"]["reconcile_interval"] = 0.2
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    container = world.container(supervisor)
    container.app.awake.set()
    container.state = "running"
    until(lambda: container.state == "paused", 3)


def test_many_agents_cost_few_calls(world):
    supervisor = world.supervisor()
    for number in range(30):
        running(supervisor, f"user{number}")
    calls = len(world.backend.calls)
    backend = supervisor.backends.get("fake")
    versions = {name: agent.row.version for name, agent in supervisor.registry.agents.items()}
    for _ in range(3):
        supervisor.reconciler.sweep_soon(backend)
        until(lambda: not backend.listing.running)
    assert world.backend.calls[calls:] == [("list", "")] * 3
    assert {name: agent.row.version for name, agent in supervisor.registry.agents.items()} == versions
    calls = len(world.backend.calls)
    supervisor.queries.top()
    assert world.backend.calls[calls:] == [("usage", "")]
