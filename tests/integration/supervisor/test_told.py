"""What the supervisor tells: to those who wait, to observers, and in its documents."""

import threading

import pytest

from dispatcher.plugin.errors import NotFound
from dispatcher.manager.agents.lifecycle import State
from tests.support.manager_world import end, reach, running, until


# --- what is told


def test_those_who_subscribe_and_wait_are_told(supervisor):
    told = []
    supervisor.subscribe(lambda name: told.append((name, supervisor.view(name).feed_state)))
    running(supervisor)
    states = [state for _, state in told]
    assert states[0] == "asleep"
    assert "starting" in states
    assert states[-1] == "running"
    assert supervisor.wait("alice", lambda view: False, 0.05).state is State.RUNNING


def test_a_subscriber_that_fails_harms_nobody(supervisor):
    def broken(_name):
        raise RuntimeError("broken")

    told = []
    supervisor.subscribe(broken)
    supervisor.subscribe(told.append)
    running(supervisor)
    assert told


def test_observers_get_all_events_in_order_and_a_broken_one_is_contained(world, supervisor):
    from dispatcher.plugin.hooks import hookimpl

    class Broken:
        @hookimpl
        def dispatcher_agent_event(self):
            raise RuntimeError("broken observer")

    supervisor._plugins.register("broken", Broken())
    running(supervisor)
    until(lambda: ("alice", "ready", "") in world.observer.seen)
    assert [kind for _, kind, _ in world.observer.seen] == ["created", "starting", "ready"]


def test_a_view_has_the_form_of_the_documents(supervisor):
    view = running(supervisor)
    assert set(view.to_json()) == {
        "name",
        "user",
        "app",
        "provider",
        "state",
        "desired",
        "stage",
        "detail",
        "fraction",
        "since",
        "failure",
        "outdated",
        "last_used",
        "created",
        "reachable",
        "observed_at",
        "move",
    }
    assert set(view.to_feed()) >= {
        "name",
        "user",
        "app",
        "label",
        "state",
        "endpoint",
        "uid",
        "stage",
        "detail",
        "fraction",
        "failed",
    }
    assert view.to_json()["since"].endswith("+00:00")
    assert view.to_feed()["endpoint"].startswith("tcp:127.0.0.1:")


def test_usage_and_runtime(world, supervisor):
    running(supervisor)
    supervisor.create("bob", app=None, password_hash="h")
    assert supervisor.memory_usage() == {
        "total": 8 << 20,
        "average": 8 << 20,
        "agents": [{"name": "alice", "memory": 8 << 20}],
    }
    alice, bob = supervisor.top()
    assert (alice["name"], alice["memory"]) == ("alice", 8 << 20)
    assert (bob["state"], bob["memory"]) == ("stopped", None)
    runtime = supervisor.runtime("alice")
    assert runtime["handle"]["name"] == world.container(supervisor).name
    assert runtime["usage"]["memory"] == 8 << 20


def test_providers_are_listed_and_checked(world, supervisor):
    fake = next(found for found in supervisor.providers() if found["name"] == "fake")
    assert fake["usable"]
    assert fake["isolation"] == "container"
    assert "suspend" in fake["capabilities"]
    assert supervisor.check_provider("fake", "demo")[0].what.startswith("Everything about the app demo")
    with world.backend.outage("down"):
        assert supervisor.check_provider("fake", None)[0].level.value == "error"
    with pytest.raises(NotFound):
        supervisor.check_provider("nothing", None)
    with pytest.raises(NotFound):
        supervisor.check_provider("fake", "nothing")


def test_every_state_can_be_explained(world, supervisor):
    supervisor.create("alice", app=None, password_hash="h")
    assert any("starts it" in sentence for sentence in supervisor.why("alice"))
    world.backend.inject("ensure", delay=0.5)
    supervisor.set_desired("alice", "running")
    until(lambda: supervisor.view("alice").stage == "waiting")
    assert any(
        "In progress" in sentence and "an injected delay" in sentence for sentence in supervisor.why("alice")
    )
    reach(supervisor, "alice", "running")
    assert any("If nobody uses it" in sentence for sentence in supervisor.why("alice"))
    supervisor.set_desired("alice", "suspended")
    reach(supervisor, "alice", "suspended")
    assert any("next request wakes it" in sentence for sentence in supervisor.why("alice"))
    for sentence in supervisor.why("alice"):
        assert "None" not in sentence
        assert "Desired." not in sentence


def test_closing_leaves_agents_alone_and_ends_all_threads(world, supervisor):
    running(supervisor)
    end(supervisor)
    assert world.container(supervisor).state == "running"
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("dispatcher-")], 12)
