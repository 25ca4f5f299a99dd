"""The supervisor on pretended agents: what people ask for happens, and what happens is shown."""

import os
import threading

import pytest

from dispatcher.errors import BadRequest, Conflict, NotFound, Unsupported
from dispatcher.manager.lifecycle import State
from dispatcher.model import Capability
from dispatcher.testing.fake_backend import ALL
from tests.manager_world import World, end, gone, reach, until


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def supervisor(world):
    return world.supervisor()


def running(supervisor, name="alice"):
    supervisor.create(name, app=None, password_hash="hash")
    supervisor.set_desired(name, "running")
    return reach(supervisor, name, "running")


def kinds(supervisor, name="alice"):
    return [event.kind for event in supervisor.events(name, 100)]


# --- coming and going


def test_a_new_agent_is_stopped_and_its_user_exists(supervisor):
    row = supervisor.create("Alice", app=None, password_hash="hash")
    assert (row.name, row.user, row.app) == ("alice", "alice", "demo")
    view = supervisor.view("alice")
    assert (view.state, view.feed_state, view.last_used) == (State.STOPPED, "asleep", None)
    assert supervisor.store.get_user("alice").password_hash == "hash"
    assert [view.name for view in supervisor.views()] == ["alice"]
    assert kinds(supervisor) == ["created"]


def test_the_same_name_twice_is_a_conflict_and_changes_nothing(supervisor):
    supervisor.create("alice", app=None, password_hash="hash")
    with pytest.raises(Conflict, match="exists"):
        supervisor.create("ALICE", app=None, password_hash=None)
    with pytest.raises(Conflict):
        supervisor.create("alice:demo", app=None, password_hash="other")
    assert supervisor.store.get_user("alice").password_hash == "hash"


def test_a_second_agent_is_called_after_its_app(world):
    world.data["apps"]["lab"] = {"provider": "fake", "fake": {}}
    supervisor = world.supervisor()
    supervisor.create("alice", app="demo", password_hash="hash")
    assert supervisor.create("alice", app="lab", password_hash=None).name == "alice:lab"
    assert [view.name for view in supervisor.views(user="alice")] == ["alice", "alice:lab"]
    assert supervisor.views(user="bob") == []
    with pytest.raises(Conflict):
        supervisor.create("alice", app="lab", password_hash=None)


@pytest.mark.parametrize(
    ("name", "app"),
    [("", None), ("a/b", None), ("alice:demo", "lab"), ("alice", "nothing"), ("alice:nothing", None)],
)
def test_bad_names_and_apps_are_refused_and_nothing_is_made(supervisor, name, app):
    with pytest.raises(BadRequest):
        supervisor.create(name, app=app, password_hash="hash")
    assert supervisor.views() == []
    assert supervisor.store.users() == []


def test_with_several_apps_and_no_default_one_must_be_named(world):
    world.data["apps"] = {"one": {"provider": "fake", "fake": {}}, "two": {"provider": "fake", "fake": {}}}
    supervisor = world.supervisor()
    with pytest.raises(BadRequest) as caught:
        supervisor.create("alice", app=None, password_hash="hash")
    assert str(caught.value).startswith("There are several apps, and none is the default: one, two (name one ")
    assert supervisor.create("alice", app="two", password_hash="hash").app == "two"


def test_without_any_app_it_says_what_to_write(world):
    world.data["apps"] = {}
    with pytest.raises(BadRequest, match=r"No app is configured \(write an \[apps.NAME\] section"):
        world.supervisor().create("alice", app=None, password_hash="hash")


def test_what_is_not_there_is_not_found(supervisor):
    for call in (
        lambda: supervisor.view("nobody"),
        lambda: supervisor.set_desired("nobody", "running"),
        lambda: supervisor.remove("nobody", keep_data=False),
        lambda: supervisor.restart("nobody"),
        lambda: supervisor.reset_data("nobody"),
        lambda: supervisor.why("nobody"),
        lambda: supervisor.logs("nobody", tail=1, after=None),
        lambda: supervisor.wait("nobody", lambda view: True, 1),
    ):
        with pytest.raises(NotFound):
            call()
    supervisor.wake("nobody")
    supervisor.touch("nobody", {"use": 1})
    supervisor.suspect("nobody")


def test_a_removed_agent_is_gone_with_its_user_and_its_data(world, supervisor):
    running(supervisor)
    data = supervisor._data.data_dir("alice")
    (data / "note").write_text("secret")
    told = []
    supervisor.subscribe(told.append)
    supervisor.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    assert supervisor.store.get_user("alice") is None
    assert not world.backend.containers
    assert not data.parent.exists()
    assert not supervisor._data.paths.endpoint_dir("alice").exists()
    assert told
    with pytest.raises(NotFound):
        supervisor.view("alice")


def test_a_user_stays_while_another_agent_is_left(world):
    world.data["apps"]["lab"] = {"provider": "fake", "fake": {}}
    supervisor = world.supervisor()
    supervisor.create("alice", app="demo", password_hash="hash")
    supervisor.create("alice", app="lab", password_hash=None)
    supervisor.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    assert supervisor.store.get_user("alice") is not None
    supervisor.remove("alice:lab", keep_data=False)
    gone(supervisor, "alice:lab")
    assert supervisor.store.get_user("alice") is None


def test_an_agent_that_is_being_removed_takes_no_other_wishes(world, supervisor):
    running(supervisor)
    world.backend.inject("stop", delay=1)
    supervisor.remove("alice", keep_data=False)
    assert supervisor.view("alice").state is State.REMOVING
    for call in (
        lambda: supervisor.set_desired("alice", "running"),
        lambda: supervisor.restart("alice"),
        lambda: supervisor.reset_data("alice"),
        lambda: supervisor.create("alice", app=None, password_hash=None),
    ):
        with pytest.raises(Conflict, match="being removed"):
            call()
    supervisor.wake("alice")
    gone(supervisor, "alice")


# --- data left behind


def test_add_after_remove_has_none_of_the_old_data(supervisor):
    running(supervisor)
    (supervisor._data.data_dir("alice") / "note").write_text("old")
    first = supervisor.runtime("alice")["uid"]
    supervisor.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    running(supervisor)
    assert list(supervisor._data.data_dir("alice").iterdir()) == []
    if os.geteuid() == 0:
        assert supervisor.runtime("alice")["uid"] != first


def test_kept_data_comes_back_to_the_same_name_only_and_it_is_said(supervisor):
    running(supervisor)
    (supervisor._data.data_dir("alice") / "note").write_text("kept")
    uid = supervisor.runtime("alice")["uid"]
    supervisor.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    running(supervisor, "bob")
    if os.geteuid() == 0:
        assert supervisor.runtime("bob")["uid"] != uid
    assert not (supervisor._data.data_dir("bob") / "note").exists()
    running(supervisor)
    assert (supervisor._data.data_dir("alice") / "note").read_text() == "kept"
    assert supervisor.runtime("alice")["uid"] == uid
    assert "was kept" in supervisor.events("alice", 10)[0].detail
    supervisor.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    running(supervisor)
    assert not (supervisor._data.data_dir("alice") / "note").exists()


def test_data_that_nobody_accounts_for_is_set_aside_and_it_is_said(supervisor):
    leftover = supervisor._data.data_dir("alice")
    leftover.mkdir(parents=True)
    (leftover / "note").write_text("whose?")
    running(supervisor)
    assert list(supervisor._data.data_dir("alice").iterdir()) == []
    detail = supervisor.events("alice", 10)[0].detail
    aside = detail.rpartition(" ")[2]
    assert "unknown origin" in detail
    with open(f"{aside}/data/note") as file:
        assert file.read() == "whose?"


def test_reset_deletes_the_data_and_starts_again_what_ran(supervisor):
    running(supervisor)
    data = supervisor._data.data_dir("alice")
    (data / "note").write_text("old")
    supervisor.reset_data("alice")
    until(lambda: "reset" in kinds(supervisor))
    reach(supervisor, "alice", "running")
    assert list(data.iterdir()) == []
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped")
    (data / "note").write_text("old")
    supervisor.reset_data("alice")
    until(lambda: kinds(supervisor).count("reset") == 2)
    assert reach(supervisor, "alice", "stopped").desired.value == "stopped"
    assert list(data.iterdir()) == []


@pytest.mark.root
def test_directories_belong_to_whom_they_should(supervisor):
    running(supervisor)
    runtime = supervisor.runtime("alice")
    data, endpoint = supervisor._data.data_dir("alice"), supervisor._data.paths.endpoint_dir("alice")

    def facts(path):
        found = path.stat()
        return found.st_uid, found.st_gid, oct(found.st_mode & 0o7777)

    assert facts(data) == (runtime["uid"], runtime["uid"], "0o700")
    assert facts(endpoint) == (runtime["uid"], 300_000, "0o2710")
    assert facts(data.parent) == (0, 0, "0o711")
    assert facts(data.parent / "log") == (0, 0, "0o700")
    assert facts(data.parent.parent) == (0, 0, "0o711")


@pytest.mark.root
def test_every_agent_has_a_user_id_of_its_own(supervisor):
    uids = {supervisor.create(f"user{number}", app=None, password_hash="h").uid for number in range(30)}
    assert len(uids) == 30
    assert all(300_001 <= uid <= 300_999 for uid in uids)


@pytest.mark.root
def test_when_no_user_id_is_left_that_is_said(world, supervisor):
    supervisor._intents._uids = (300_001, 300_002)
    supervisor.create("a", app=None, password_hash="h")
    supervisor.create("b", app=None, password_hash="h")
    with pytest.raises(Conflict, match="No host user id"):
        supervisor.create("c", app=None, password_hash="h")
    supervisor.remove("a", keep_data=False)
    gone(supervisor, "a")
    supervisor.create("c", app=None, password_hash="h")


# --- states


def test_a_start_is_ready_only_when_the_app_answers(world):
    world.app(fake={"endpoint": "none"}, start_timeout=0.5)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="hash")
    supervisor.set_desired("alice", "running")
    assert supervisor.view("alice").feed_state == "starting"
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
        supervisor.set_desired("alice", state)
        view = reach(supervisor, "alice", state)
        assert view.feed_state == feed
        assert (view.endpoint is not None) == (feed == "running")
    assert kinds(supervisor).count("resumed") == 2


def test_sleep_keeps_the_process_and_a_stop_does_not(world, supervisor):
    running(supervisor)
    first = world.container(supervisor).app
    supervisor.set_desired("alice", "suspended")
    reach(supervisor, "alice", "suspended")
    supervisor.wake("alice")
    reach(supervisor, "alice", "running")
    assert world.container(supervisor).app is first
    supervisor.restart("alice")
    until(lambda: world.container(supervisor) and world.container(supervisor).app is not first)
    reach(supervisor, "alice", "running")


def test_what_the_provider_cannot_do_is_refused_early(world):
    world.backend.capabilities = ALL - {Capability.HIBERNATE}
    supervisor = world.supervisor()
    running(supervisor)
    with pytest.raises(Unsupported, match="hibernated"):
        supervisor.set_desired("alice", "hibernated")
    assert supervisor.view("alice").desired.value == "running"


def test_what_does_not_run_cannot_sleep(supervisor):
    supervisor.create("alice", app=None, password_hash="hash")
    with pytest.raises(Conflict, match="does not run"):
        supervisor.set_desired("alice", "suspended")


@pytest.mark.parametrize("state", ["absent", "RUNNING", "", "failed"])
def test_unknown_states_are_refused(supervisor, state):
    supervisor.create("alice", app=None, password_hash="hash")
    with pytest.raises(BadRequest, match="valid are"):
        supervisor.set_desired("alice", state)


def test_what_is_so_already_costs_nothing(world, supervisor):
    running(supervisor)
    calls, before = len(world.backend.calls), supervisor.engine.find("alice").row.version
    supervisor.set_desired("alice", "running")
    supervisor.wake("alice")
    assert supervisor.engine.find("alice").row.version == before
    assert len(world.backend.calls) == calls


def test_waking_is_idempotent(world, supervisor):
    supervisor.create("alice", app=None, password_hash="hash")
    for _ in range(50):
        supervisor.wake("alice")
    reach(supervisor, "alice", "running")
    assert world.backend.calls.count(("ensure", "alice")) == 1


# --- the newest intent wins


def test_a_slow_start_is_cancelled_and_cleaned_up(world, supervisor):
    supervisor.create("alice", app=None, password_hash="hash")
    world.backend.inject("ensure", delay=20)
    supervisor.set_desired("alice", "running")
    until(lambda: supervisor.view("alice").stage == "waiting")
    supervisor.set_desired("alice", "stopped")
    view = reach(supervisor, "alice", "stopped", seconds=5)
    assert view.failure is None
    assert not world.backend.containers


def test_a_start_that_waits_for_the_app_is_cancelled(world):
    world.app(fake={"endpoint": "none"})
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="hash")
    supervisor.set_desired("alice", "running")
    until(lambda: supervisor.view("alice").stage == "waiting for the app")
    supervisor.set_desired("alice", "stopped")
    assert reach(supervisor, "alice", "stopped", seconds=5).failure is None


def test_a_start_is_cancelled_by_removing_the_agent(world, supervisor):
    supervisor.create("alice", app=None, password_hash="hash")
    world.backend.inject("prepare", delay=20)
    supervisor.set_desired("alice", "running")
    until(lambda: supervisor.view("alice").stage == "waiting")
    supervisor.remove("alice", keep_data=False)
    gone(supervisor, "alice", seconds=5)


def test_stop_and_start_at_once(world, supervisor):
    running(supervisor)
    world.backend.inject("stop", delay=0.3)
    supervisor.set_desired("alice", "stopped")
    assert supervisor.view("alice").state is State.STOPPING
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "running")
    assert view.failure is None
    assert world.container(supervisor).state == "running"


def test_a_storm_of_wishes_ends_with_the_last_one(world, supervisor):
    running(supervisor)
    for state in ("stopped", "running", "suspended", "running", "stopped", "running") * 5:
        try:
            supervisor.set_desired("alice", state)
        except Conflict:
            assert state == "suspended"
    reach(supervisor, "alice", "running")
    for state in ("running", "stopped") * 10:
        supervisor.set_desired("alice", state)
    reach(supervisor, "alice", "stopped")
    until(lambda: world.container(supervisor).state == "exited")


def test_wishes_from_many_threads(world, supervisor):
    names = [f"user{number}" for number in range(10)]
    for name in names:
        supervisor.create(name, app=None, password_hash="h")

    def wish(seed):
        for turn in range(10):
            name = names[(seed + turn) % len(names)]
            (supervisor.restart if turn % 3 == 0 else supervisor.wake)(name)
            supervisor.set_desired(name, "stopped" if turn % 2 else "running")

    threads = [threading.Thread(target=wish, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name in names:
        supervisor.set_desired(name, "running")
    for name in names:
        reach(supervisor, name, "running")
    assert len(world.backend.containers) == 10


def test_use_keeps_an_agent_awake_that_is_being_put_to_sleep_as_nobody_used_it(world):
    world.app(idle_timeout=0.4)
    supervisor = world.supervisor()
    running(supervisor)
    world.backend.inject("suspend", delay=0.5)
    until(lambda: supervisor.view("alice").state.value == "suspending")
    supervisor.touch("alice", {"use": 1})
    reach(supervisor, "alice", "running")
    assert supervisor.view("alice").desired.value == "running"


def test_use_of_a_moment_ago_does_not_contradict_who_puts_an_agent_to_sleep(world, supervisor):
    """What was used is reported every five seconds: most of it is older than the wish."""
    running(supervisor)
    world.backend.inject("suspend", delay=0.3)
    supervisor.set_desired("alice", "suspended")
    supervisor.touch("alice", {"use": 1})
    reach(supervisor, "alice", "suspended")
    supervisor.touch("alice", {"use": 1})
    assert supervisor.view("alice").desired.value == "suspended"
    supervisor.wake("alice")
    reach(supervisor, "alice", "running")


# --- 50 at once, beside each other


def test_fifty_starts_at_once(world, supervisor):
    names = [f"user{number}" for number in range(50)]
    for name in names:
        supervisor.create(name, app=None, password_hash="h")
    threads = [threading.Thread(target=supervisor.set_desired, args=(name, "running")) for name in names]
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
        supervisor.create(name, app="slow", password_hash="h")
    supervisor.create("alice", app="demo", password_hash="h")
    world.backend.inject("prepare", delay=3)
    for name in names:
        supervisor.set_desired(name, "running")
    until(lambda: all(supervisor.view(name).stage == "waiting" for name in names), 2)
    supervisor.set_desired("alice", "running")
    reach(supervisor, "alice", "running", seconds=2)  # the slow ones take three
    for name in names:
        reach(supervisor, name, "running")
    assert world.backend.calls.count(("prepare", "")) == 2


def test_who_waits_for_a_preparation_may_leave_and_the_others_get_it(world, supervisor):
    for name in ("alice", "bob"):
        supervisor.create(name, app=None, password_hash="h")
    world.backend.inject("prepare", delay=1)
    supervisor.set_desired("alice", "running")
    supervisor.set_desired("bob", "running")
    until(lambda: supervisor.view("bob").stage == "waiting")
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped", seconds=5)
    reach(supervisor, "bob", "running")
    assert world.backend.calls.count(("prepare", "")) == 1


# --- death


def test_a_killed_agent_comes_back_and_it_is_told(world, supervisor):
    running(supervisor)
    first = world.container(supervisor).app
    world.kill(supervisor)
    until(lambda: "died" in kinds(supervisor))
    view = reach(supervisor, "alice", "running")
    assert world.container(supervisor).app is not first
    assert view.failure is None
    assert (
        next(event for event in supervisor.events("alice", 10) if event.kind == "died").detail
        == "killed by signal 9"
    )
    assert any(
        "It last died" in sentence and "killed by signal 9" in sentence for sentence in supervisor.why("alice")
    )


def test_without_events_the_edge_s_suspicion_finds_a_dead_agent(world):
    world.backend.capabilities = ALL - {Capability.EVENTS}
    supervisor = world.supervisor()
    running(supervisor)
    world.kill(supervisor)
    supervisor.suspect("alice")
    until(lambda: "died" in kinds(supervisor))
    reach(supervisor, "alice", "running")


def test_an_app_that_ends_again_and_again_is_given_up_with_its_last_lines(world):
    world.app(environment={"PROBE_EXIT": "3"}, max_restarts=2)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="hash")
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "failed", seconds=5)
    assert view.failure.what == "The app ended before it was ready"
    assert view.failure.why == "exit code 3"
    assert view.failure.log == ("last words",)
    assert "next try" in view.detail
    until(lambda: supervisor.engine.find("alice").row.retry_at is None and supervisor.view("alice").failure, 10)
    assert world.backend.calls.count(("ensure", "alice")) == 3
    supervisor.wake("alice")  # a page that reloads itself
    assert supervisor.view("alice").state is State.FAILED
    told = "\n".join(supervisor.why("alice"))
    assert "given up after 3 tries" in told
    assert "last words" in told
    supervisor.set_desired("alice", "running")  # somebody means it
    until(lambda: world.backend.calls.count(("ensure", "alice")) == 4)


def test_an_agent_that_dies_in_a_loop_is_given_up(world):
    world.app(max_restarts=2)
    supervisor = world.supervisor()
    running(supervisor)
    world.kill(supervisor)
    until(lambda: kinds(supervisor).count("ready") == 2)
    world.kill(supervisor, reason="out of memory")
    view = reach(supervisor, "alice", "failed", seconds=5)
    assert view.failure.why == "out of memory"
    reach(supervisor, "alice", "running", seconds=3)
    world.kill(supervisor)
    view = reach(supervisor, "alice", "failed")
    assert "3 times" in view.failure.what
    assert view.failure.log
    assert supervisor.engine.find("alice").row.retry_at is None


def test_an_app_that_stops_listening_is_started_again(world):
    world.app(start_timeout=0.5)
    supervisor = world.supervisor()
    running(supervisor)
    app = world.container(supervisor).app
    app._listener.shutdown(2)
    app._listener.close()
    supervisor.suspect("alice")
    until(lambda: supervisor.view("alice").feed_state == "starting", 2)
    until(lambda: world.container(supervisor).app is not app, 8)
    reach(supervisor, "alice", "running", seconds=5)


def test_something_that_ends_while_it_sleeps_stays_away_until_somebody_comes(world, supervisor):
    running(supervisor)
    supervisor.set_desired("alice", "suspended")
    reach(supervisor, "alice", "suspended")
    world.kill(supervisor)
    view = reach(supervisor, "alice", "stopped")
    assert view.feed_state == "asleep"
    supervisor.wake("alice")
    reach(supervisor, "alice", "running")


# --- the configuration changes


def test_another_configuration_makes_agents_outdated_and_a_restart_renews_them(world, supervisor):
    running(supervisor)
    world.app(environment={"COLOUR": "blue"})
    changed = supervisor.apply_config(world.config())
    assert any("demo has changed: environment" in sentence for sentence in changed)
    assert any("outdated" in sentence for sentence in changed)
    view = supervisor.view("alice")
    assert view.outdated
    assert view.state is State.RUNNING
    assert kinds(supervisor)[-1] == "outdated"
    assert any("dispatcher restart alice" in sentence for sentence in supervisor.why("alice"))
    supervisor.set_desired("alice", "suspended")
    reach(supervisor, "alice", "suspended")
    supervisor.wake("alice")  # waking keeps the memory, so it stays as it was
    assert reach(supervisor, "alice", "running").outdated
    supervisor.restart("alice")
    until(lambda: not supervisor.view("alice").outdated)
    reach(supervisor, "alice", "running")
    assert world.container(supervisor).app.environment["COLOUR"] == "blue"


def test_an_app_that_goes_can_be_stopped_and_removed_but_not_started(world, supervisor):
    running(supervisor)
    running(supervisor, "bob")
    world.data["apps"] = {"other": {"provider": "fake", "fake": {}}}
    changed = supervisor.apply_config(world.config())
    assert any("demo is gone" in sentence for sentence in changed)
    assert supervisor.view("alice").state is State.RUNNING
    assert any("no longer in the configuration" in sentence for sentence in supervisor.why("alice"))
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped")
    supervisor.set_desired("alice", "running")
    view = reach(supervisor, "alice", "failed")
    assert "no app" in view.failure.what
    supervisor.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    supervisor.remove("bob", keep_data=False)
    gone(supervisor, "bob")


def test_a_fault_of_the_configuration_is_final_until_it_changes(world):
    world.app(fake={"image": "missing"}, max_restarts=0)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="hash")
    supervisor.set_desired("alice", "running")
    assert "no image" in reach(supervisor, "alice", "failed").failure.what
    world.app(fake={})
    supervisor.apply_config(world.config())
    supervisor.set_desired("alice", "running")
    reach(supervisor, "alice", "running")


def test_a_wrong_configuration_changes_nothing(world, supervisor):
    running(supervisor)
    world.app(fake={"imagge": "x"})
    with pytest.raises(BadRequest):
        supervisor.apply_config(world.config())
    assert not supervisor.view("alice").outdated


# --- credentials


def test_an_app_that_takes_the_login_starts_only_at_a_sign_in(world):
    world.app(credentials="stdin", max_restarts=5)
    supervisor = world.supervisor()
    supervisor.create("alice", app=None, password_hash="hash")
    supervisor.wake("alice")
    view = reach(supervisor, "alice", "failed")
    assert "sign-in" in view.failure.what
    supervisor.set_desired("alice", "running", stdin=b'{"password": "s3cret"}\n')
    reach(supervisor, "alice", "running")
    assert world.container(supervisor).app.stdin == b'{"password": "s3cret"}\n'
    supervisor.set_desired("alice", "suspended")
    reach(supervisor, "alice", "suspended")
    supervisor.wake("alice")
    reach(supervisor, "alice", "running")
    world.kill(supervisor)
    view = reach(supervisor, "alice", "failed")
    assert "sign out and sign in" in view.failure.fix
    stored = (world.directory / "state/dispatcher.db").read_bytes()
    assert b"s3cret" not in stored


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
    from dispatcher.hookspecs import hookimpl

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
