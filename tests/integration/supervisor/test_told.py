"""What the supervisor tells: to those who wait, to observers, and in its documents."""

import threading

import pytest

from dispatcher.plugin.errors import NotFound
from dispatcher.manager.storage.rows import Desired
from dispatcher.manager.agents.lifecycle import State
from tests.support.manager_world import end, kinds, reach, running, until


# --- what is told


def test_those_who_subscribe_and_wait_are_told(supervisor):
    told = []
    supervisor.registry.subscribe(lambda name: told.append((name, supervisor.queries.view(name).feed_state)))
    running(supervisor)
    states = [state for _, state in told]
    assert states[0] == "asleep"
    assert "starting" in states
    assert states[-1] == "running"
    assert supervisor.queries.wait("alice", lambda view: False, 0.05).state is State.RUNNING


def test_a_subscriber_that_fails_harms_nobody(supervisor):
    def broken(_name):
        raise RuntimeError("broken")

    told = []
    supervisor.registry.subscribe(broken)
    supervisor.registry.subscribe(told.append)
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
        "disk",
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
    supervisor.commands.create("bob", app=None, password_hash="h")
    assert supervisor.queries.memory_usage() == {
        "total": 8 << 20,
        "average": 8 << 20,
        "agents": [{"name": "alice", "memory": 8 << 20}],
    }
    alice, bob = supervisor.queries.top()
    assert (alice["name"], alice["memory"]) == ("alice", 8 << 20)
    assert (bob["state"], bob["memory"]) == ("stopped", None)
    runtime = supervisor.queries.runtime("alice")
    assert runtime["handle"]["name"] == world.container(supervisor).name
    assert runtime["usage"]["memory"] == 8 << 20


def test_providers_are_listed_and_checked(world, supervisor):
    fake = next(found for found in supervisor.queries.providers() if found["name"] == "fake")
    assert fake["usable"]
    assert fake["isolation"] == "container"
    assert "suspend" in fake["capabilities"]
    assert supervisor.queries.check_provider("fake", "demo")[0].what.startswith("Everything about the app demo")
    with world.backend.outage("down"):
        assert supervisor.queries.check_provider("fake", None)[0].level.value == "error"
    with pytest.raises(NotFound):
        supervisor.queries.check_provider("nothing", None)
    with pytest.raises(NotFound):
        supervisor.queries.check_provider("fake", "nothing")


def test_providers_check_says_what_is_unlimited(world):
    world.app(memory=False)
    supervisor = world.supervisor()

    def told(app):
        return [each.what for each in supervisor.queries.check_provider("fake", app) if "unlimited" in each.what]

    assert told("demo") == [
        "demo: `disk` is unlimited: one agent can use up the disk of the host",
        "demo: `memory` is unlimited: one agent can use up the memory of the host",
    ]
    assert told(None) == told("demo")
    world.data["apps"]["second"] = world.data["apps"]["demo"]
    supervisor.apply_config(world.config())
    assert told(None) == [each.replace("demo:", "demo, second:") for each in told("demo")], "said once"
    del world.data["apps"]["second"]
    world.app(memory="1G", pids=False, disk="1G")
    supervisor.apply_config(world.config())
    assert told(None) == ["demo: `pids` is unlimited: one agent can use up the processes of the host"]


def test_a_process_killed_for_memory_is_told_while_the_app_goes_on(world):
    world.app(memory="512M")
    supervisor = world.supervisor()
    running(supervisor)
    told = "the kernel killed 2 of its processes, as its memory reached its limit of 512.0 MiB"
    world.container(supervisor).oom_kills = 2
    for _ in range(2):  # it is told once
        supervisor.reconcile()
        until(lambda: supervisor.queries.view("alice").detail == told)
    assert [event.detail for event in supervisor.queries.events("alice", 20) if event.kind == "out-of-memory"] == [
        told
    ]
    why = "\n".join(supervisor.queries.why("alice"))
    assert told in why
    assert "raise `memory` of the app demo" in why
    supervisor.commands.restart("alice")
    until(lambda: supervisor.queries.view("alice").detail == "" and reach(supervisor, "alice", "running"))
    assert told not in "\n".join(supervisor.queries.why("alice"))


def test_what_was_killed_before_the_manager_began_is_not_told_again(world):
    old = world.supervisor()
    running(old)
    world.container(old).oom_kills = 1
    end(old)
    new = world.supervisor()
    reach(new, "alice", "running")
    new.reconcile()
    world.container(new).oom_kills = 2
    new.reconcile()
    until(lambda: "the kernel killed 1 of its processes" in new.queries.view("alice").detail)
    assert kinds(new).count("out-of-memory") == 1


def test_every_state_can_be_explained(world, supervisor):
    supervisor.commands.create("alice", app=None, password_hash="h")
    assert any("starts it" in sentence for sentence in supervisor.queries.why("alice"))
    world.backend.inject("ensure", delay=0.5)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: supervisor.queries.view("alice").stage == "waiting")
    assert any(
        "In progress" in sentence and "an injected delay" in sentence
        for sentence in supervisor.queries.why("alice")
    )
    reach(supervisor, "alice", "running")
    assert any("If it is not used" in sentence for sentence in supervisor.queries.why("alice"))
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    assert any("next request wakes it" in sentence for sentence in supervisor.queries.why("alice"))
    for sentence in supervisor.queries.why("alice"):
        assert "None" not in sentence
        assert "Desired." not in sentence


def test_closing_leaves_agents_alone_and_ends_all_threads(world, request):
    before = set(threading.enumerate())  # with threads that other tests made hang on purpose
    supervisor = request.getfixturevalue("supervisor")
    running(supervisor)

    def left() -> list[str]:
        threads = set(threading.enumerate()) - before
        return sorted(thread.name for thread in threads if thread.name.startswith("dispatcher-"))

    assert left()
    end(supervisor)
    assert world.container(supervisor).state == "running"
    try:
        until(lambda: not left(), 12)
    except AssertionError:
        raise AssertionError(left())
