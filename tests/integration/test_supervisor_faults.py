"""Providers, backends, disks and databases that misbehave: contained to what they concern, with the reason."""

import os
import threading
import time

import pytest

from dispatcher.clock import Deadline
from dispatcher.errors import ConfigError, ProviderError, Unavailable
from dispatcher.manager import operations, pool, readiness, reconciler
from dispatcher.manager.lifecycle import State
from dispatcher.model import BackendState, Capability, Handle, Observation
from dispatcher.testing.fake_backend import ALL
from tests.manager_world import World, end, gone, reach, until


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def hasty(monkeypatch):
    """Calls that hang are noticed soon."""
    monkeypatch.setattr(pool, "SLACK", 0.1)
    monkeypatch.setattr(operations, "STOP_SLACK", 0.3)
    monkeypatch.setattr(operations, "SUSPEND_TIME", 0.3)
    monkeypatch.setattr(operations, "DESTROY_TIME", 0.3)
    monkeypatch.setattr(reconciler, "LIST_TIME", 0.3)
    for module in (readiness, operations, reconciler):
        monkeypatch.setattr(module, "OBSERVE", 0.3)


def running(supervisor, name="alice"):
    supervisor.create(name, app=None, password_hash="hash")
    supervisor.set_desired(name, "running")
    return reach(supervisor, name, "running")


def others_go_on(supervisor):
    running(supervisor, "bob")
    supervisor.set_desired("bob", "stopped")
    reach(supervisor, "bob", "stopped")


STARTING = ["prepare", "ensure", "observe"]


@pytest.mark.parametrize("method", STARTING)
@pytest.mark.parametrize(
    "error", [ValueError("broken plugin"), SystemExit("leaving"), ProviderError("No space", fix="make some")]
)
def test_a_provider_that_raises_in_a_start(world, method, error):
    world.app(max_restarts=0)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.inject(method, error=error, agent=None if method == "prepare" else "alice")
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "failed")
    if isinstance(error, ProviderError):
        assert view.failure.what == "No space"
        assert view.failure.fix == "make some"
    else:
        assert method in view.failure.what
        assert str(error) in view.failure.why
        assert "fault of the plugin" in view.failure.fix
    others_go_on(supervisor)
    supervisor.set_desired("alice", "running")
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
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.inject(method, result=nonsense, agent="alice", after=True)
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "failed")
    assert f"nonsense from {method}" in view.failure.what
    assert "fault of the plugin" in view.failure.fix
    others_go_on(supervisor)
    assert "alice" not in {c.labels["agent"] for c in world.backend.containers.values() if c.state == "running"}
    supervisor.set_desired("alice", "running")
    reach(supervisor, "alice", "running")


@pytest.mark.parametrize(
    "nonsense", [None, 5, [None], [("a", "b")], [(Handle(provider="other", agent="a", name="b"), None)]]
)
def test_a_list_of_nonsense_changes_nothing(world, nonsense):
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("list", result=nonsense, after=True)
    backend = supervisor._backends.get("fake")
    supervisor._reconciler.kick(backend)
    until(lambda: not backend.reachable)
    view = supervisor.view("alice")
    assert (view.state, view.feed_state, view.reachable) == (State.UNKNOWN, "running", False)
    supervisor._reconciler.kick(backend)
    until(lambda: backend.reachable)
    assert supervisor.view("alice").state is State.RUNNING


@pytest.mark.parametrize("method", ["ensure", "observe", "prepare"])
def test_a_start_that_hangs_holds_up_nobody_else(world, hasty, method):
    world.data["manager"]["provider_threads"] = 1
    world.app(start_timeout=0.3, prepare_timeout=0.3)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.inject(method, hang=True, agent=None if method == "prepare" else "alice")
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "failed", seconds=4)
    assert "does not come back" in view.failure.what
    assert method in view.failure.why
    if method != "prepare":
        others_go_on(supervisor)
        assert any("until the provider's call returns" in sentence for sentence in supervisor.why("alice"))
        supervisor.set_desired("alice", "running")  # nothing is called twice at once for one agent
        time.sleep(0.2)
        assert world.backend.calls.count((method, "alice")) == 1
        assert supervisor.view("alice").state is State.FAILED
    world.backend.release()
    reach(supervisor, "alice", "running")
    others_go_on(supervisor) if method == "prepare" else None


@pytest.mark.parametrize(("method", "wish"), [("stop", "stopped"), ("suspend", "suspended"), ("stop", "absent")])
def test_an_end_that_hangs_holds_up_nobody_else(world, hasty, method, wish):
    world.data["manager"]["provider_threads"] = 1
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject(method, hang=True)
    if wish == "absent":
        supervisor.remove("alice", keep_data=False)
    else:
        supervisor.set_desired("alice", wish)
    until(lambda: supervisor.view("alice").failure, 5)
    assert "hangs" in supervisor.view("alice").failure.why
    others_go_on(supervisor)
    world.backend.release()
    if wish == "absent":
        gone(supervisor, "alice")
    else:
        reach(supervisor, "alice", wish)


def test_a_list_that_hangs_makes_the_backend_unreachable_and_is_not_asked_twice(world, hasty):
    supervisor = world.supervisor()
    running(supervisor)
    backend = supervisor._backends.get("fake")
    asked = world.backend.calls.count(("list", ""))
    world.backend.inject("list", hang=True)
    supervisor._reconciler.kick(backend)
    until(lambda: not backend.reachable, 5)
    supervisor._reconciler.kick(backend)
    assert world.backend.calls.count(("list", "")) == asked + 1
    assert supervisor.view("alice").feed_state == "running"
    world.backend.release()
    until(lambda: not backend.listing)
    until(lambda: backend.reachable)


def test_a_backend_that_hangs_does_not_hold_up_a_boot(world, monkeypatch):
    from dispatcher.manager import supervisor as module

    monkeypatch.setattr(module, "BOOT", 0.2)
    old = world.supervisor()
    running(old)
    end(old)
    world.backend.inject("list", hang=True)
    before = time.monotonic()
    new = world.supervisor()
    assert time.monotonic() - before < 1
    view = new.view("alice")
    assert (view.state, view.feed_state) == (State.UNKNOWN, "running")
    world.backend.release()
    reach(new, "alice", "running")


def test_a_stop_that_fails_is_tried_again_until_it_works(world, monkeypatch):
    from dispatcher.manager import outcomes

    monkeypatch.setattr(outcomes, "LONGEST_RETRY", 0.1)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("stop", error=ProviderError("Device busy"), times=3)
    supervisor.set_desired("alice", "stopped")
    until(lambda: supervisor.view("alice").failure)
    view = reach(supervisor, "alice", "stopped")
    assert view.failure is None
    assert [event.kind for event in supervisor.events("alice", 20)].count("failed") == 3


def test_a_failed_suspension_leaves_the_agent_served(world):
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("suspend", error=ProviderError("No"))
    supervisor.set_desired("alice", "suspended")
    view = reach(supervisor, "alice", "failed")
    assert (view.feed_state, view.failure.what) == ("running", "No")
    assert view.endpoint
    supervisor.touch("alice", {"use": 1})
    view = reach(supervisor, "alice", "running")
    assert view.failure is None


def test_a_removal_that_fails_is_tried_again(world, monkeypatch):
    from dispatcher.manager import outcomes

    monkeypatch.setattr(outcomes, "LONGEST_RETRY", 0.1)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("destroy", error=ValueError("broken"), times=2)
    supervisor.remove("alice", keep_data=False)
    until(lambda: supervisor.view("alice").failure)
    assert supervisor.view("alice").state is State.REMOVING
    gone(supervisor, "alice")


def test_a_failed_start_leaves_nothing_running(world):
    world.app(fake={"endpoint": "none"}, start_timeout=0.2, max_restarts=0)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    supervisor.set_desired("alice", "running")
    reach(supervisor, "alice", "failed")
    assert world.container(supervisor).state == "exited"
    world.app(fake={})
    supervisor.apply_config(world.config())
    supervisor.set_desired("alice", "running")
    reach(supervisor, "alice", "running")


def test_a_provider_that_cancels_by_itself_is_told_to_be_wrong(world):
    from dispatcher.errors import Cancelled

    world.app(max_restarts=0)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", error=Cancelled("I do not want to"))
    supervisor.set_desired("alice", "running")
    assert "nobody cancelled it" in reach(supervisor, "alice", "failed").failure.what


def test_progress_with_nonsense_harms_nothing(world):
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    agent = supervisor.engine.find("alice")
    world.backend.inject("ensure", delay=0.5)
    supervisor.set_desired("alice", "running")
    tell = supervisor.engine.progress(agent, until(lambda: agent.operation))
    tell(None, {"a": 1}, "half")
    tell("step\x1b[31m" * 100, "token=abc", float("nan"))
    assert "\x1b" not in supervisor.view("alice").stage
    assert supervisor.view("alice").fraction is None
    tell("step", "", 7.0)
    assert supervisor.view("alice").fraction == 1.0
    reach(supervisor, "alice", "running")


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


# --- disks, databases, clocks


def fail_writes(supervisor):
    def full(*_args, **_more):
        raise Unavailable("The database cannot be used now", why="database or disk is full")

    saved = supervisor.store.save
    supervisor.store.save = full
    return lambda: setattr(supervisor.store, "save", saved)


def test_a_wish_that_cannot_be_written_is_refused_and_nothing_happens(world):
    supervisor = world.supervisor()
    running(supervisor)
    heal = fail_writes(supervisor)
    calls = len(world.backend.calls)
    for wish in (
        lambda: supervisor.set_desired("alice", "stopped"),
        lambda: supervisor.restart("alice"),
        lambda: supervisor.remove("alice", keep_data=False),
        lambda: supervisor.reset_data("alice"),
    ):
        with pytest.raises(Unavailable, match="disk is full"):
            wish()
    assert supervisor.view("alice").state is State.RUNNING
    assert len(world.backend.calls) == calls
    heal()
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped")


def test_what_happens_while_nothing_can_be_written_is_written_later(world):
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", delay=0.3)
    supervisor.set_desired("alice", "running")
    heal = fail_writes(supervisor)
    view = reach(supervisor, "alice", "running")
    assert view.feed_state == "running"
    assert supervisor.store.agents()[0].observed is BackendState.ABSENT
    heal()
    until(lambda: supervisor.store.agents()[0].observed is BackendState.RUNNING, 3)
    until(lambda: "ready" in [event.kind for event in supervisor.events("alice", 5)])


def test_nothing_is_begun_that_cannot_be_written(world):
    supervisor = world.supervisor()
    running(supervisor)
    heal = fail_writes(supervisor)
    ensured = world.backend.calls.count(("ensure", "alice"))
    world.kill(supervisor)
    until(lambda: supervisor.view("alice").feed_state == "starting")
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
            supervisor.set_desired("alice", "stopped")
        assert supervisor.view("alice").state is State.RUNNING
        connection.exec_driver_sql("ROLLBACK")
    other.dispose()
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped")


def test_a_disk_that_is_full_fails_the_start_with_the_reason(world, monkeypatch):
    world.app(max_restarts=5)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="h")
    prepare = supervisor._data.prepare

    def full(_row):
        raise OSError(28, "No space left on device", "/data")

    supervisor._data.prepare = full
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "failed")
    assert "No space left" in view.failure.why
    assert "disk" in view.failure.fix
    supervisor._data.prepare = prepare
    reach(supervisor, "alice", "running", seconds=3)


def test_a_jump_of_the_wall_clock_moves_nothing(world, monkeypatch):
    world.app(idle_timeout=3600)
    supervisor = world.supervisor()
    view = running(supervisor)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    supervisor._idleness.check()
    supervisor._reconcile()
    time.sleep(0.1)
    assert supervisor.view("alice").state is State.RUNNING
    end(supervisor)
    new = world.supervisor()
    new._idleness.check()
    assert new.view("alice").state is State.RUNNING
    assert new.view("alice").since == pytest.approx(view.since, abs=0.01)


def test_hostile_names_in_logs_are_harmless(world, caplog):
    supervisor = world.supervisor()
    for name in ("a\nb", "a" * 10_000_000, "\x1b[31m"):
        supervisor.wake(name)
        supervisor.suspect(name)
    assert all("\x1b" not in record.getMessage() for record in caplog.records)


def test_the_guard_checks_capabilities_that_are_nonsense(world):
    supervisor = world.supervisor()
    world.backend.capabilities = frozenset({"fly"})
    assert supervisor._backends.get("fake").guard.capabilities == frozenset()


@pytest.mark.parametrize("method", ["logs", "check"])
def test_a_question_that_hangs_does_not_hold_the_one_who_asks(world, method, monkeypatch):
    from dispatcher.errors import DeadlineExceeded
    from dispatcher.manager import inspection, tail

    monkeypatch.setattr(tail, "ANSWER", 0.1)
    monkeypatch.setattr(inspection, "CHECK", 0.1)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject(method, hang=True)
    before = time.monotonic()
    if method == "logs":
        with pytest.raises(DeadlineExceeded):
            supervisor.logs("alice", tail=5, after=None)
    else:
        assert "does not come back" in supervisor.check_provider("fake", None)[0].what
    assert time.monotonic() - before < 5
    assert supervisor.view("alice").state is State.RUNNING


def test_a_provider_that_cannot_be_closed_does_not_hold_up_the_end(world, monkeypatch):
    from dispatcher.manager import supervisor as module

    monkeypatch.setattr(module, "CLOSE", 0.2)
    supervisor = world.supervisor()
    running(supervisor)
    provider = supervisor._backends.get("fake").guard.provider
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
    supervisor.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", hang=True, error=ProviderError("No"))
    supervisor.set_desired("alice", "running")
    until(lambda: ("ensure", "alice") in world.backend.calls)
    if wish == "absent":
        supervisor.remove("alice", keep_data=False)
    else:
        supervisor.set_desired("alice", wish)
    world.backend.release()
    if wish == "absent":
        gone(supervisor, "alice", seconds=3)
    else:
        assert reach(supervisor, "alice", "stopped", seconds=3).failure is None


def test_a_sleeper_that_vanished_is_started_afresh(world):
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.set_desired("alice", "suspended")
    reach(supervisor, "alice", "suspended")
    world.backend.containers.clear()
    supervisor.wake("alice")
    reach(supervisor, "alice", "running")
    assert world.backend.calls.count(("ensure", "alice")) == 2


def test_what_runs_behind_our_back_as_it_was_meant_earlier_is_replaced(world):
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped")
    container = world.container(supervisor)
    container.state, container.labels["hash"] = "running", "another"
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "running")
    assert not view.outdated
    assert world.container(supervisor).labels["hash"] != "another"


def test_what_is_not_ours_in_a_list_is_left_alone(world, caplog):
    supervisor = world.supervisor()
    running(supervisor)
    stranger = Handle(provider="fake", agent="bob", name="dispatcher-ffffffff-bob-000000000000")
    good = list(supervisor._backends.get("fake").guard.provider.list(deadline=Deadline(5)))
    world.backend.inject("list", result=[*good, (stranger, Observation(state=BackendState.RUNNING))], after=True)
    supervisor._reconciler.kick(supervisor._backends.get("fake"))
    until(lambda: "is not ours" in caplog.text)
    time.sleep(0.05)
    assert ("destroy", "bob") not in world.backend.calls
    assert supervisor.view("alice").state is State.RUNNING


@pytest.mark.root
def test_directories_of_another_owner_are_mended(world):
    """A restored backup has lost its owners; a stale endpoint directory belonged to somebody else."""
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped")
    data, endpoint = supervisor._data.data_dir("alice"), supervisor._data.paths.endpoint_dir("alice")
    (data / "note").write_text("mine")
    os.chown(data, 0, 0)
    os.chown(endpoint, 12345, 12345)
    (endpoint / "trap").write_text("x")
    running_uid = supervisor.runtime("alice")["uid"]
    supervisor.set_desired("alice", "running")
    reach(supervisor, "alice", "running")
    assert (data / "note").stat().st_uid == running_uid
    assert endpoint.stat().st_uid == running_uid
    assert not (endpoint / "trap").exists()
