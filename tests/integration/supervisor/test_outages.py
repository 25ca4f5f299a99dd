"""Backends that are away, and what happens behind the manager's back: known agents stay what they were."""

import time

import pytest

from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.manager.agents.lifecycle import State
from dispatcher.plugin.model import Capability
from dispatcher.testing.fake_backend import ALL
from tests.support.manager_world import end, reach, running, until


# --- backends that are away


def test_an_outage_makes_states_unknown_and_then_what_they_are(world):
    supervisor = world.supervisor()
    running(supervisor)
    running(supervisor, "bob")
    running(supervisor, "carol")
    supervisor.set_desired("carol", "stopped")
    reach(supervisor, "carol", "stopped")
    backend = supervisor._backends.get("fake")
    world.backend.down = True
    supervisor._reconciler.kick(backend)
    until(lambda: supervisor.view("alice").state is State.UNKNOWN)
    view = supervisor.view("alice")
    assert (view.feed_state, view.reachable) == ("running", False)
    assert view.observed_at < time.time() + 1
    assert "does not answer" in view.detail
    assert supervisor.view("carol").state is State.STOPPED
    assert any("cannot be asked since" in sentence for sentence in supervisor.why("alice"))
    assert not next(found for found in supervisor.providers() if found["name"] == "fake")["usable"]
    world.kill(supervisor, "bob")
    world.backend.down = False
    supervisor._reconciler.kick(backend)
    reach(supervisor, "alice", "running")
    until(lambda: "died" in [event.kind for event in supervisor.events("bob", 20)])
    reach(supervisor, "bob", "running")
    kinds = [event.kind for event in supervisor.events("alice", 20)]
    assert kinds[-2:] == ["unreachable", "reachable"]


def test_one_backend_s_outage_does_not_concern_another(world):
    world.data["apps"]["far"] = {"provider": "away", "away": {}}
    supervisor = world.supervisor()
    supervisor.create("bob", app="far", password_hash="h")
    supervisor.set_desired("bob", "running")
    reach(supervisor, "bob", "running")
    world.away.down = True
    supervisor._reconciler.kick(supervisor._backends.get("away"))
    until(lambda: supervisor.view("bob").state is State.UNKNOWN)
    supervisor.create("alice", app="demo", password_hash="h")
    supervisor.set_desired("alice", "running")
    reach(supervisor, "alice", "running")


def test_a_start_during_an_outage_is_tried_again_when_it_is_over(world):
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.down = True
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "failed")
    assert "does not answer" in view.failure.what
    world.backend.down = False
    supervisor._reconciler.kick(supervisor._backends.get("fake"))
    reach(supervisor, "alice", "running", seconds=2)
    assert supervisor.engine.find("alice").row.attempts == ()


def test_a_manager_that_boots_during_an_outage_changes_nothing_and_goes_on_serving(world):
    old = world.supervisor()
    running(old)
    end(old)
    world.backend.down = True
    new = world.supervisor()
    view = new.view("alice")
    assert (view.state, view.feed_state, view.reachable) == (State.UNKNOWN, "running", False)
    assert view.observed_at is not None
    world.backend.down = False
    app = world.container(new).app
    new._reconciler.kick(new._backends.get("fake"))
    reach(new, "alice", "running")
    assert world.container(new).app is app


def test_one_failed_poll_in_a_start_is_no_failure(world):
    world.app(fake={"endpoint": "unix"})
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.inject("observe", error=Unavailable("once"), times=1)
    supervisor.set_desired("alice", "running")
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
    view = new.view("alice")
    assert (view.state, view.feed_state) == (State.UNKNOWN, "running")
    assert any("no plugin" in sentence for sentence in new.why("alice"))
    assert next(found for found in new.providers() if found["name"] == "fake")["usable"] is False
    new.create("bob", app=None, password_hash="h")
    new.set_desired("bob", "running")
    reach(new, "bob", "running")
    with pytest.raises(ConfigError, match="no plugin"):
        new.check_provider("fake", None) and new._backends.get("fake").guard


def test_a_watch_that_cannot_be_had_is_tried_again(world):
    world.data["manager"]["reconcile_interval"] = 0.2
    world.backend.inject("watch", error=RuntimeError("no events"), times=1)
    supervisor = world.supervisor()
    running(supervisor)
    until(lambda: world.backend._watchers)
    world.kill(supervisor)
    until(lambda: "died" in [event.kind for event in supervisor.events("alice", 20)])


def test_without_events_the_reconciler_finds_the_dead(world):
    world.backend.capabilities = ALL - {Capability.EVENTS}
    world.data["manager"]["reconcile_interval"] = 0.2
    supervisor = world.supervisor()
    running(supervisor)
    world.kill(supervisor)
    until(lambda: "died" in [event.kind for event in supervisor.events("alice", 20)], 2)
    reach(supervisor, "alice", "running")


def test_what_somebody_started_behind_our_back_is_stopped(world):
    world.data["manager"]["reconcile_interval"] = 0.2
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.set_desired("alice", "suspended")
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
    backend = supervisor._backends.get("fake")
    versions = {name: agent.row.version for name, agent in supervisor.engine.agents.items()}
    for _ in range(3):
        supervisor._reconciler.kick(backend)
        until(lambda: not backend.listing)
    assert world.backend.calls[calls:] == [("list", "")] * 3
    assert {name: agent.row.version for name, agent in supervisor.engine.agents.items()} == versions
    calls = len(world.backend.calls)
    supervisor.top()
    assert world.backend.calls[calls:] == [("usage", "")]
