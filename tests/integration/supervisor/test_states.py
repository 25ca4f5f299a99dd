"""The supervisor on pretended agents: what people ask for happens, and what happens is shown."""

import threading

import pytest

from dispatcher.plugin.errors import BadRequest, Conflict, Unsupported
from dispatcher.manager.agents.lifecycle import State
from dispatcher.plugin.model import Capability
from dispatcher.manager.agents.commands import desired_state
from dispatcher.manager.storage.rows import Desired
from tests.support.fake_backend import ALL
from tests.support.manager_world import gone, kinds, reach, running, until


# --- states


def test_a_start_is_ready_only_when_the_app_answers(world):
    world.app(fake={"endpoint": "none"}, start_timeout=0.5)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    assert supervisor.queries.view("alice").feed_state == "starting"
    view = reach(supervisor, "alice", "failed")
    assert view.feed_state == "failed"
    assert "did not become ready in time" in view.failure.what
    assert view.failure.fix


def test_the_way_through_all_states(world, supervisor):
    running(supervisor)
    for state, feed in (
        ("suspended", "asleep"),
        ("running", "running"),
        ("hibernated", "asleep"),
        ("running", "running"),
        ("suspended", "asleep"),
        ("hibernated", "asleep"),
        ("stopped", "asleep"),
        ("running", "running"),
        ("suspended", "asleep"),
        ("stopped", "asleep"),
    ):
        supervisor.commands.set_desired("alice", Desired(state))
        view = reach(supervisor, "alice", state)
        assert view.feed_state == feed
        assert (view.endpoint is not None) == (feed == "running")
    assert kinds(supervisor).count("resumed") == 2


@pytest.mark.parametrize("state", ["suspended", "hibernated"])
def test_the_edge_knows_before_an_agent_is_suspended(supervisor, state):
    seen = []

    def wait_for_edge():
        view = supervisor.queries.view("alice")
        seen.append((view.feed_state, view.desired.value))

    running(supervisor)
    supervisor.registry.wait_for_edge = wait_for_edge
    supervisor.commands.set_desired("alice", Desired(state))
    reach(supervisor, "alice", state)
    assert seen == [("stopping", state)]


def test_sleep_keeps_the_process_and_a_stop_does_not(world, supervisor):
    running(supervisor)
    first = world.container(supervisor).app
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    supervisor.commands.wake("alice")
    reach(supervisor, "alice", "running")
    assert world.container(supervisor).app is first
    supervisor.commands.restart("alice")
    until(lambda: world.container(supervisor) and world.container(supervisor).app is not first)
    reach(supervisor, "alice", "running")


def test_what_the_provider_cannot_do_is_refused_early(world):
    world.backend.capabilities = ALL - {Capability.HIBERNATE}
    supervisor = world.supervisor()
    running(supervisor)
    with pytest.raises(Unsupported, match="hibernated"):
        supervisor.commands.set_desired("alice", Desired.HIBERNATED)
    assert supervisor.queries.view("alice").desired.value == "running"


def test_what_does_not_run_cannot_sleep(supervisor):
    supervisor.commands.create("alice", app=None, password_hash="hash")
    with pytest.raises(Conflict, match="is not running"):
        supervisor.commands.set_desired("alice", Desired.SUSPENDED)


@pytest.mark.parametrize("state", ["absent", "RUNNING", "", "failed"])
def test_unknown_states_are_refused(state):
    with pytest.raises(BadRequest, match="valid are"):
        desired_state(state)


def test_what_is_so_already_costs_nothing(world, supervisor):
    running(supervisor)
    calls, before = len(world.backend.calls), supervisor.registry.find("alice").row.version
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    supervisor.commands.wake("alice")
    assert supervisor.registry.find("alice").row.version == before
    assert len(world.backend.calls) == calls


def test_waking_is_idempotent(world, supervisor):
    supervisor.commands.create("alice", app=None, password_hash="hash")
    for _ in range(50):
        supervisor.commands.wake("alice")
    reach(supervisor, "alice", "running")
    assert world.backend.calls.count(("ensure", "alice")) == 1


# --- the newest intent wins


def test_a_slow_start_is_cancelled_and_cleaned_up(world, supervisor):
    supervisor.commands.create("alice", app=None, password_hash="hash")
    world.backend.inject("ensure", delay=20)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: supervisor.queries.view("alice").stage == "waiting")
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    view = reach(supervisor, "alice", "stopped", seconds=5)
    assert view.failure is None
    assert not world.backend.containers


def test_a_start_that_waits_for_the_app_is_cancelled(world):
    world.app(fake={"endpoint": "none"})
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: supervisor.queries.view("alice").stage == "waiting for the app")
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    assert reach(supervisor, "alice", "stopped", seconds=5).failure is None


def test_a_start_is_cancelled_by_removing_the_agent(world, supervisor):
    supervisor.commands.create("alice", app=None, password_hash="hash")
    world.backend.inject("prepare", delay=20)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: supervisor.queries.view("alice").stage == "waiting")
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice", seconds=5)


def test_stop_and_start_at_once(world, supervisor):
    running(supervisor)
    world.backend.inject("stop", delay=0.3)
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    assert supervisor.queries.view("alice").state is State.STOPPING
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "running")
    assert view.failure is None
    assert world.container(supervisor).state == "running"


def test_many_commands_end_with_the_last_one(world, supervisor):
    running(supervisor)
    for state in ("stopped", "running", "suspended", "running", "stopped", "running") * 5:
        try:
            supervisor.commands.set_desired("alice", Desired(state))
        except Conflict:
            assert state == "suspended"
    reach(supervisor, "alice", "running")
    for state in ("running", "stopped") * 10:
        supervisor.commands.set_desired("alice", Desired(state))
    reach(supervisor, "alice", "stopped")
    until(lambda: world.container(supervisor).state == "exited")


def test_commands_from_many_threads(world, supervisor):
    names = [f"user{number}" for number in range(10)]
    for name in names:
        supervisor.commands.create(name, app=None, password_hash="h")

    def wish(seed):
        for turn in range(10):
            name = names[(seed + turn) % len(names)]
            (supervisor.commands.restart if turn % 3 == 0 else supervisor.commands.wake)(name)
            supervisor.commands.set_desired(name, Desired.STOPPED if turn % 2 else Desired.RUNNING)

    threads = [threading.Thread(target=wish, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name in names:
        supervisor.commands.set_desired(name, Desired.RUNNING)
    for name in names:
        reach(supervisor, name, "running")
    assert len(world.backend.containers) == 10


def test_use_keeps_an_agent_awake_that_is_being_put_to_sleep_as_nobody_used_it(world):
    world.app(idle_timeout=0.4)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("suspend", delay=0.5)
    until(lambda: supervisor.queries.view("alice").state.value == "suspending")
    supervisor.commands.record_activity("alice", {"use": 1})
    reach(supervisor, "alice", "running")
    assert supervisor.queries.view("alice").desired.value == "running"


def test_use_of_a_moment_ago_does_not_contradict_who_puts_an_agent_to_sleep(world, supervisor):
    """What was used is reported every five seconds: most of it is older than the wish."""
    running(supervisor)
    world.backend.inject("suspend", delay=0.3)
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    supervisor.commands.record_activity("alice", {"use": 1})
    reach(supervisor, "alice", "suspended")
    supervisor.commands.record_activity("alice", {"use": 1})
    assert supervisor.queries.view("alice").desired.value == "suspended"
    supervisor.commands.wake("alice")
    reach(supervisor, "alice", "running")


# --- 50 at once, beside each other


def test_fifty_starts_at_once(world, supervisor):
    names = [f"user{number}" for number in range(50)]
    for name in names:
        supervisor.commands.create(name, app=None, password_hash="h")
    threads = [
        threading.Thread(target=supervisor.commands.set_desired, args=(name, Desired.RUNNING)) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    endpoints = {str(reach(supervisor, name, "running").endpoint) for name in names}
    assert len(endpoints) == 50


def test_a_slow_preparation_of_one_app_delays_no_other(world):
    world.data["apps"]["slow"] = {"provider": "fake", "environment": {"SLOW": "1"}, "fake": {}}
    supervisor = world.supervisor()
    names = [f"slow{number}" for number in range(20)]  # more than there are threads
    for name in names:
        supervisor.commands.create(name, app="slow", password_hash="h")
    supervisor.commands.create("alice", app="demo", password_hash="h")
    world.backend.inject("prepare", delay=3)
    for name in names:
        supervisor.commands.set_desired(name, Desired.RUNNING)
    until(lambda: all(supervisor.queries.view(name).stage == "waiting" for name in names), 2)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running", seconds=2)  # the slow ones take three
    for name in names:
        reach(supervisor, name, "running")
    assert world.backend.calls.count(("prepare", "")) == 2


def test_who_waits_for_a_preparation_may_leave_and_the_others_get_it(world, supervisor):
    for name in ("alice", "bob"):
        supervisor.commands.create(name, app=None, password_hash="h")
    world.backend.inject("prepare", delay=1)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    supervisor.commands.set_desired("bob", Desired.RUNNING)
    until(lambda: supervisor.queries.view("bob").stage == "waiting")
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped", seconds=5)
    reach(supervisor, "bob", "running")
    assert world.backend.calls.count(("prepare", "")) == 1
