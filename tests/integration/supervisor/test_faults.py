"""Providers, backends, disks and databases that misbehave: contained to what they concern, with the reason."""

import os
import threading
import time

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError
from dispatcher.manager.backends import pool
from dispatcher.manager.agents.operations import readiness, runner, task
from dispatcher.manager.agents import reconciler
from dispatcher.manager.agents.operations.task import Task
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin.model import BackendState, Handle, Observation
from tests.support.manager_world import end, gone, reach, running, until


@pytest.fixture
def hasty(monkeypatch):
    """Calls that hang are noticed soon."""
    monkeypatch.setattr(pool, "SLACK", 0.1)
    monkeypatch.setattr(task, "STOP_SLACK", 0.3)
    monkeypatch.setattr(runner, "SUSPEND_TIME", 0.3)
    monkeypatch.setattr(runner, "DESTROY_TIME", 0.3)
    monkeypatch.setattr(reconciler, "LIST_TIME", 0.3)
    for module in (readiness, runner, reconciler):
        monkeypatch.setattr(module, "OBSERVE", 0.3)


def others_go_on(supervisor):
    running(supervisor, "bob")
    supervisor.commands.set_desired("bob", Desired.STOPPED)
    reach(supervisor, "bob", "stopped")


STARTING = ["prepare", "ensure", "observe"]


@pytest.mark.parametrize("method", STARTING)
@pytest.mark.parametrize(
    "error", [ValueError("broken plugin"), SystemExit("leaving"), ProviderError("No space", fix="make some")]
)
def test_a_provider_that_raises_in_a_start(world, method, error):
    world.app(max_restarts=0)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject(method, error=error, agent=None if method == "prepare" else "alice")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed")
    if isinstance(error, ProviderError):
        assert view.failure.what == "No space"
        assert view.failure.fix == "make some"
    else:
        assert method in view.failure.what
        assert str(error) in view.failure.why
        assert "authors of the plugin" in view.failure.fix
    others_go_on(supervisor)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")


@pytest.mark.parametrize(
    ("method", "nonsense"),
    [
        ("ensure", None),
        ("ensure", "a handle"),
        ("ensure", Handle(provider="fake", agent="mallory", name="x")),
        ("ensure", Handle(provider="other", agent="alice", name="x")),
        ("observe", None),
        ("observe", {"state": "running"}),
        ("observe", Observation(state="running")),
        ("observe", Observation(state=BackendState.RUNNING, endpoint="unix:/x")),
        ("observe", Observation(state=BackendState.RUNNING, owner_uid="root")),
    ],
)
def test_a_provider_that_returns_nonsense_in_a_start(world, method, nonsense):
    world.app(max_restarts=0)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject(method, result=nonsense, agent="alice", after=True)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed")
    assert f"invalid value from {method}" in view.failure.what
    assert "authors of the plugin" in view.failure.fix
    others_go_on(supervisor)
    assert "alice" not in {c.labels["agent"] for c in world.backend.containers.values() if c.state == "running"}
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")


@pytest.mark.parametrize(
    "nonsense", [None, 5, [None], [("a", "b")], [(Handle(provider="other", agent="a", name="b"), None)]]
)
def test_a_list_of_nonsense_changes_nothing(world, nonsense):
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("list", result=nonsense, after=True)
    backend = supervisor.backends.get("fake")
    supervisor.reconciler.sweep_soon(backend)
    until(lambda: not backend.reachable)
    view = supervisor.queries.view("alice")
    assert (view.state, view.feed_state, view.reachable) == (State.UNKNOWN, "running", False)
    supervisor.reconciler.sweep_soon(backend)
    until(lambda: backend.reachable)
    assert supervisor.queries.view("alice").state is State.RUNNING


@pytest.mark.parametrize("method", ["ensure", "observe", "prepare"])
def test_a_start_that_hangs_does_not_delay_other_agents(world, hasty, method):
    world.data["manager"]["provider_threads"] = 1
    world.app(start_timeout=0.3, prepare_timeout=0.3)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject(method, hang=True, agent=None if method == "prepare" else "alice")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed", seconds=4)
    assert "does not return" in view.failure.what
    assert method in view.failure.why
    if method != "prepare":
        others_go_on(supervisor)
        assert any("until the provider's call returns" in sentence for sentence in supervisor.queries.why("alice"))
        supervisor.commands.set_desired("alice", Desired.RUNNING)  # nothing is called twice at once for one agent
        time.sleep(0.2)
        assert world.backend.calls.count((method, "alice")) == 1
        assert supervisor.queries.view("alice").state is State.FAILED
    world.backend.release()
    reach(supervisor, "alice", "running")
    others_go_on(supervisor) if method == "prepare" else None


@pytest.mark.parametrize(("method", "wish"), [("stop", "stopped"), ("suspend", "suspended"), ("stop", "absent")])
def test_a_stop_that_hangs_does_not_delay_other_agents(world, hasty, method, wish):
    world.data["manager"]["provider_threads"] = 1
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject(method, hang=True)
    if wish == "absent":
        supervisor.commands.remove("alice", keep_data=False)
    else:
        supervisor.commands.set_desired("alice", Desired(wish))
    until(lambda: supervisor.queries.view("alice").failure, 5)
    assert "hangs" in supervisor.queries.view("alice").failure.why
    others_go_on(supervisor)
    world.backend.release()
    if wish == "absent":
        gone(supervisor, "alice")
    else:
        reach(supervisor, "alice", wish)


def test_a_list_that_hangs_makes_the_backend_unreachable_and_is_not_asked_twice(world, hasty):
    supervisor = world.supervisor()
    running(supervisor)
    backend = supervisor.backends.get("fake")
    asked = world.backend.calls.count(("list", ""))
    world.backend.inject("list", hang=True)
    supervisor.reconciler.sweep_soon(backend)
    until(lambda: not backend.reachable, 5)
    supervisor.reconciler.sweep_soon(backend)
    assert world.backend.calls.count(("list", "")) == asked + 1
    assert supervisor.queries.view("alice").feed_state == "running"
    world.backend.release()
    until(lambda: not backend.listing.running)
    until(lambda: backend.reachable)


def test_a_backend_that_hangs_does_not_hold_up_a_boot(world, monkeypatch):
    from dispatcher.manager.agents import composition as module

    monkeypatch.setattr(module, "BOOT", 0.2)
    old = world.supervisor()
    running(old)
    end(old)
    world.backend.inject("list", hang=True)
    before = time.monotonic()
    new = world.supervisor()
    assert time.monotonic() - before < 1
    view = new.queries.view("alice")
    assert (view.state, view.feed_state) == (State.UNKNOWN, "running")
    world.backend.release()
    reach(new, "alice", "running")


def test_a_stop_that_fails_is_tried_again_until_it_works(world, monkeypatch):
    from dispatcher.manager.agents import restarts

    monkeypatch.setattr(restarts, "MAX_RETRY", 0.1)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("stop", error=ProviderError("Device busy"), times=3)
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    until(lambda: supervisor.queries.view("alice").failure)
    view = reach(supervisor, "alice", "stopped")
    assert view.failure is None
    assert [event.kind for event in supervisor.queries.events("alice", 20)].count("failed") == 3


def test_a_failed_suspension_leaves_the_agent_served(world):
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("suspend", error=ProviderError("No"))
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    view = reach(supervisor, "alice", "failed")
    assert (view.feed_state, view.failure.what) == ("running", "No")
    assert view.endpoint
    supervisor.commands.record_activity("alice", {"use": 1})
    view = reach(supervisor, "alice", "running")
    assert view.failure is None


def test_a_removal_that_fails_is_tried_again(world, monkeypatch):
    from dispatcher.manager.agents import restarts

    monkeypatch.setattr(restarts, "MAX_RETRY", 0.1)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("destroy", error=ValueError("broken"), times=2)
    supervisor.commands.remove("alice", keep_data=False)
    until(lambda: supervisor.queries.view("alice").failure)
    assert supervisor.queries.view("alice").state is State.REMOVING
    gone(supervisor, "alice")


def test_a_failed_start_leaves_nothing_running(world):
    world.app(fake={"endpoint": "none"}, start_timeout=0.2, max_restarts=0)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "failed")
    assert world.container(supervisor).state == "exited"
    world.app(fake={})
    supervisor.apply_config(world.config())
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")


def test_a_provider_that_cancels_by_itself_is_told_to_be_wrong(world):
    from dispatcher.plugin.errors import Cancelled

    world.app(max_restarts=0)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", error=Cancelled("I do not want to"))
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    assert "without a cancellation" in reach(supervisor, "alice", "failed").failure.what


def test_progress_with_nonsense_harms_nothing(world):
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    agent = supervisor.registry.find("alice")
    world.backend.inject("ensure", delay=0.5)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    tell = Task(supervisor.registry, agent, until(lambda: agent.operation)).progress
    tell(None, {"a": 1}, "half")
    tell("step\x1b[31m" * 100, "token=abc", float("nan"))
    assert "\x1b" not in supervisor.queries.view("alice").stage
    assert supervisor.queries.view("alice").fraction is None
    tell("step", "", 7.0)
    assert supervisor.queries.view("alice").fraction == 1.0
    reach(supervisor, "alice", "running")


# --- names, questions, ends


def test_hostile_names_in_logs_are_harmless(world, caplog):
    supervisor = world.supervisor()
    for name in ("a\nb", "a" * 10_000_000, "\x1b[31m"):
        supervisor.commands.wake(name)
        supervisor.reconciler.check_endpoint(name)
    assert all("\x1b" not in record.getMessage() for record in caplog.records)


def test_a_provider_with_capabilities_that_are_nonsense_cannot_be_used(world):
    world.backend.capabilities = frozenset({"fly"})
    backend = world.supervisor().backends.get("fake")
    assert not backend.usable
    assert "invalid value from capabilities: 'fly' is not a valid Capability" in str(backend.problem)


@pytest.mark.parametrize("method", ["logs", "check"])
def test_a_question_that_hangs_does_not_hold_the_one_who_asks(world, method, monkeypatch):
    from dispatcher.plugin.errors import DeadlineExceeded
    from dispatcher.manager.agents import queries
    from dispatcher.manager.backends import logs

    monkeypatch.setattr(logs, "TIMEOUT", 0.1)
    monkeypatch.setattr(queries, "CHECK", 0.1)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject(method, hang=True)
    before = time.monotonic()
    if method == "logs":
        with pytest.raises(DeadlineExceeded):
            supervisor.queries.logs("alice", tail=5, after=None)
    else:
        assert "does not return" in supervisor.queries.check_provider("fake", None)[0].what
    assert time.monotonic() - before < 5
    assert supervisor.queries.view("alice").state is State.RUNNING


def test_a_provider_that_cannot_be_closed_does_not_hold_up_the_end(world, monkeypatch):
    from dispatcher.manager.agents import composition as module

    monkeypatch.setattr(module, "CLOSE", 0.2)
    supervisor = world.supervisor()
    running(supervisor)
    provider = supervisor.backends.get("fake").provider.wrapped
    gate = threading.Event()
    provider.close = lambda: gate.wait(20)
    before = time.monotonic()
    end(supervisor)
    assert time.monotonic() - before < 5
    gate.set()


@pytest.mark.parametrize("wish", ["stopped", "absent"])
def test_how_a_start_failed_is_of_no_interest_to_a_newer_wish(world, wish):
    """The provider is deaf to the cancellation and fails for good; what is wanted by now happens at once."""
    world.app(max_restarts=0)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", hang=True, error=ProviderError("No"))
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: ("ensure", "alice") in world.backend.calls)
    if wish == "absent":
        supervisor.commands.remove("alice", keep_data=False)
    else:
        supervisor.commands.set_desired("alice", Desired(wish))
    world.backend.release()
    if wish == "absent":
        gone(supervisor, "alice", seconds=3)
    else:
        assert reach(supervisor, "alice", "stopped", seconds=3).failure is None


def test_a_sleeper_that_vanished_is_started_afresh(world):
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    world.backend.containers.clear()
    supervisor.commands.wake("alice")
    reach(supervisor, "alice", "running")
    assert world.backend.calls.count(("ensure", "alice")) == 2


def test_what_runs_behind_our_back_as_it_was_meant_earlier_is_replaced(world):
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    container = world.container(supervisor)
    container.state, container.labels["hash"] = "running", "another"
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "running")
    assert not view.outdated
    assert world.container(supervisor).labels["hash"] != "another"


def test_what_is_not_ours_in_a_list_is_left_alone(world, caplog):
    supervisor = world.supervisor()
    running(supervisor)
    stranger = Handle(provider="fake", agent="bob", name="dispatcher-ffffffff-bob-000000000000")
    good = list(supervisor.backends.get("fake").provider.wrapped.list(deadline=Deadline(5)))
    world.backend.inject("list", result=[*good, (stranger, Observation(state=BackendState.RUNNING))], after=True)
    supervisor.reconciler.sweep_soon(supervisor.backends.get("fake"))
    until(lambda: "not of this installation" in caplog.text)
    time.sleep(0.05)
    assert ("destroy", "bob") not in world.backend.calls
    assert supervisor.queries.view("alice").state is State.RUNNING


@pytest.mark.root
def test_directories_of_another_owner_are_mended(world):
    """A restored backup has lost its owners; a stale endpoint directory belonged to somebody else."""
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    data, endpoint = supervisor.data.data_dir("alice"), supervisor.data.paths.endpoint_dir("alice")
    (data / "note").write_text("mine")
    os.chown(data, 0, 0)
    os.chown(endpoint, 12345, 12345)
    (endpoint / "trap").write_text("x")
    running_uid = supervisor.queries.runtime("alice")["uid"]
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")
    assert (data / "note").stat().st_uid == running_uid
    assert endpoint.stat().st_uid == running_uid
    assert not (endpoint / "trap").exists()
