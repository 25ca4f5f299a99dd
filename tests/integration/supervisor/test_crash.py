"""A manager that is killed anywhere is followed by one that finishes: no orphan, no double, nothing lost."""

import time

import pytest

from dispatcher.manager.agents.lifecycle import State
from dispatcher.plugin.model import Capability
from dispatcher.manager.storage.rows import Desired
from tests.support.fake_backend import ALL
from tests.support.manager_world import Crash, World, cut_off, end, gone, reach, running, until


@pytest.fixture
def world(world):
    crashes = []
    world.crash = lambda *args, **more: crashes.append(Crash(world, *args, **more)) or crashes[-1]
    yield world
    for crash in crashes:
        crash.release()


def alive(world):
    return [one for one in world.backend.containers.values() if one.state != "exited"]


@pytest.mark.parametrize("step", ["preparing", "starting", "started", "waiting for the app"])
def test_killed_in_a_start(world, step):
    old = world.supervisor()
    old.commands.create("alice", app=None, password_hash="hash")
    crash = world.crash(old, step)
    old.commands.set_desired("alice", Desired.RUNNING)
    crash.happen()
    new = world.supervisor()
    reach(new, "alice", "running")
    assert len(alive(world)) == 1
    ensured = world.backend.calls.count(("ensure", "alice"))
    assert ensured == (2 if step in {"started", "waiting for the app"} else 1)
    new.commands.remove("alice", keep_data=False)
    gone(new, "alice")
    assert world.backend.containers == {}


@pytest.mark.parametrize("step", ["preparing", "starting", "started", "waiting for the app"])
def test_killed_in_a_start_and_then_it_shall_stop(world, step):
    """The last intent was written before the manager was killed."""
    old = world.supervisor()
    old.commands.create("alice", app=None, password_hash="hash")
    crash = world.crash(old, step)
    old.commands.set_desired("alice", Desired.RUNNING)
    assert crash.reached.wait(10)
    old.commands.set_desired("alice", Desired.STOPPED)
    crash.happen()
    new = world.supervisor()
    reach(new, "alice", "stopped")
    assert alive(world) == []


@pytest.mark.parametrize(
    ("kind", "step", "wish", "outcome"),
    [
        ("stop", "stopping", "stopped", "stopped"),
        ("stop", "stopped", "stopped", "stopped"),
        ("suspend", "suspending", "suspended", "suspended"),
        ("hibernate", "hibernating", "hibernated", "hibernated"),
        ("stop", "stopping", "restart", "running"),
        ("stop", "stopped", "restart", "running"),
        ("start", "starting", "restart", "running"),
    ],
)
def test_killed_in_the_middle(world, kind, step, wish, outcome):
    old = world.supervisor()
    running(old)
    first = world.container(old).app
    crash = world.crash(old, step, kind)
    if wish == "restart":
        old.commands.restart("alice")
    else:
        old.commands.set_desired("alice", Desired(wish))
    crash.happen()
    new = world.supervisor()
    reach(new, "alice", outcome)
    if wish == "restart":
        until(lambda: world.container(new).app is not first)
        reach(new, "alice", "running")
    assert len(world.backend.containers) <= 1


@pytest.mark.parametrize("step", ["stopping", "stopped", "deleting the data"])
def test_killed_in_a_reset(world, step):
    old = world.supervisor()
    running(old)
    (old.data.data_dir("alice") / "note").write_text("old")
    crash = world.crash(old, step, "reset")
    old.commands.reset_data("alice")
    crash.happen()
    new = world.supervisor()
    until(lambda: "reset" in [event.kind for event in new.queries.events("alice", 20)])
    reach(new, "alice", "running")
    assert list(new.data.data_dir("alice").iterdir()) == []


@pytest.mark.parametrize("step", ["stopping", "stopped", "removing", "deleting the data", "forgetting"])
@pytest.mark.parametrize("keep", [False, True])
def test_killed_in_a_removal(world, step, keep):
    old = world.supervisor()
    running(old)
    data = old.data.data_dir("alice")
    (data / "note").write_text("old")
    crash = world.crash(old, step, "remove")
    old.commands.remove("alice", keep_data=keep)
    crash.happen()
    new = world.supervisor()
    until(lambda: "alice" not in new.registry.agents)
    assert world.backend.containers == {}
    assert data.exists() == keep
    assert new.store.users() == []
    running(new)
    assert (data / "note").exists() == keep


def test_killed_between_the_deletion_of_data_and_its_end(world):
    """What was moved to the trash is deleted by the next manager."""
    old = world.supervisor()
    end(old)
    trash = world.directory / "state/agents/.trash/left"
    trash.mkdir(parents=True)
    (trash / "note").write_text("old")
    world.supervisor()
    until(lambda: not trash.exists())


# --- moves


@pytest.fixture
def to_own_data(world):
    world.away.capabilities = ALL | {Capability.OWN_DATA}
    return world


@pytest.mark.parametrize(
    "step", ["checking", "stopping", "importing", "verifying", "handing over", "tidying up", "starting"]
)
def test_killed_in_a_move_to_a_provider_with_data_of_its_own(to_own_data, step):
    world = to_own_data
    old = world.supervisor()
    running(old)
    data = old.data.data_dir("alice")
    (data / "note").write_text("mine")
    world.app(provider="away")
    old.apply_config(world.config())
    crash = world.crash(old, step, "start" if step == "starting" else "move")
    old.commands.restart("alice")
    crash.happen()
    new = world.supervisor()
    view = reach(new, "alice", "running")
    until(lambda: new.queries.view("alice").move is None)
    assert view.provider == "away"
    assert alive(world) == []
    (volume,) = world.away.volumes.values()
    assert (volume / "note").read_text() == "mine"
    (copy,) = new.copies.list("alice")
    assert copy["kind"] == "directory"
    home = data.parent
    assert sorted(path.name for path in home.iterdir()) == ["copies", "data", "log"]
    (kept,) = (home / "copies").iterdir()
    assert (kept / "note").read_text() == "mine"
    assert list(data.iterdir()) == []
    assert new.copies.purge("alice") == 1
    assert not kept.exists()


@pytest.mark.parametrize("step", ["checking", "stopping", "exporting", "handing over", "tidying up", "starting"])
def test_killed_in_a_move_from_a_provider_with_data_of_its_own(to_own_data, step):
    world = to_own_data
    world.app(provider="away")
    old = world.supervisor()
    running(old)
    (volume,) = world.away.volumes.values()
    (volume / "note").write_text("mine")
    world.app(provider="fake")
    old.apply_config(world.config())
    crash = world.crash(old, step, "start" if step == "starting" else "move")
    old.commands.restart("alice")
    crash.happen()
    new = world.supervisor()
    assert reach(new, "alice", "running").provider == "fake"
    until(lambda: new.queries.view("alice").move is None)
    data = new.data.data_dir("alice")
    assert (data / "note").read_text() == "mine"
    assert (volume / "note").read_text() == "mine"  # the old copy, until purged
    assert new.copies.list("alice")[0]["kind"] == "provider"
    assert sorted(path.name for path in data.parent.iterdir()) == ["data", "log"]
    assert new.copies.purge("alice") == 1
    assert not volume.exists()


# --- whole managers


def test_a_restarted_manager_adopts_what_runs(world):
    old = world.supervisor()
    for number in range(20):
        running(old, f"user{number}")
    apps = {name: one.app for name, one in world.backend.containers.items()}
    end(old)
    calls = len(world.backend.calls)
    before = time.monotonic()
    new = world.supervisor()
    assert time.monotonic() - before < 2  # the figure that counts is measured on a quiet machine: bench/
    for number in range(20):
        view = new.queries.view(f"user{number}")
        assert (view.state, view.feed_state) == (State.RUNNING, "running")
        assert [event.kind for event in new.queries.events(f"user{number}", 1)] == ["adopted"]
    assert {name: one.app for name, one in world.backend.containers.items()} == apps
    assert [call for call in world.backend.calls[calls:] if call[0] != "list"] == []


def test_a_busy_agent_that_does_not_answer_during_a_restart_is_kept(world):
    old = world.supervisor()
    running(old)
    app = world.container(old).app
    app.awake.clear()  # it accepts connections and does not answer
    end(old)
    new = world.supervisor()
    assert new.queries.view("alice").feed_state == "running"
    assert world.container(new).app is app
    app.awake.set()


def test_since_survives_a_restart(world):
    old = world.supervisor()
    since = running(old).since
    end(old)
    assert world.supervisor().queries.view("alice").since == pytest.approx(since, abs=0.001)


def test_what_died_while_no_manager_lived_is_started_again(world):
    old = world.supervisor()
    running(old)
    end(old)
    world.kill(old)
    new = world.supervisor()
    reach(new, "alice", "running")
    assert "died" in [event.kind for event in new.queries.events("alice", 20)]


def test_after_a_boot_of_the_host_everything_starts_again_without_counting(world):
    world.app(max_restarts=0)
    old = world.supervisor()
    running(old)
    running(old, "bob")
    old.commands.set_desired("bob", Desired.STOPPED)
    reach(old, "bob", "stopped")
    old.database.set_meta("boot", "another boot")
    end(old)
    for one in list(world.backend.containers):
        if world.backend.containers[one].state == "running":
            world.backend.kill(one)
    new = world.supervisor()
    reach(new, "alice", "running")
    assert new.queries.view("bob").state is State.STOPPED
    died = [event for event in new.queries.events("alice", 20) if event.kind == "died"]
    assert died[0].detail == "the host was restarted"


def test_an_agent_whose_wish_was_not_carried_out_gets_it_from_the_next_manager(world):
    old = world.supervisor()
    running(old)
    cut_off(old)
    from dispatcher.manager.storage.database import Database

    database = Database(f"sqlite:///{world.directory}/state/dispatcher.db")
    import sqlalchemy as sa

    with database.write() as connection:
        connection.execute(sa.text("UPDATE agents SET desired = 'stopped', version = version + 1"))
    database.close()
    new = world.supervisor()
    reach(new, "alice", "stopped")
    assert alive(world) == []
    end(old)


def test_a_back_off_survives_a_restart(world):
    world.app(environment={"PROBE_EXIT": "3"}, max_restarts=3)
    old = world.supervisor()
    old.commands.create("alice", app=None, password_hash="hash")
    old.commands.set_desired("alice", Desired.RUNNING)
    reach(old, "alice", "failed")
    end(old)
    ensured = world.backend.calls.count(("ensure", "alice"))
    new = world.supervisor()
    assert new.queries.view("alice").state is State.FAILED
    assert world.backend.calls.count(("ensure", "alice")) == ensured
    until(lambda: world.backend.calls.count(("ensure", "alice")) == ensured + 1, 3)
    assert new.queries.view("alice").failure is None or new.queries.view("alice").failure.why == "exit code 3"


# --- strangers


def test_what_carries_our_label_and_is_unknown_is_removed_and_its_data_kept(to_own_data):
    world = to_own_data
    world.app(provider="away")
    old = world.supervisor()
    running(old)
    running(old, "bob")
    end(old)
    database = world.database()
    import sqlalchemy as sa

    with database.write() as connection:
        connection.execute(sa.text("DELETE FROM agents WHERE name = 'alice'"))
    database.close()
    new = world.supervisor()
    until(lambda: len(world.away.containers) == 1)
    assert new.queries.view("bob").state is State.RUNNING
    assert len(world.away.volumes) == 2


def test_two_installations_on_one_backend_leave_each_other_alone(world, tmp_path_factory):
    other = World(tmp_path_factory.mktemp("other"))
    try:
        other.data["providers"] = world.data["providers"]
        one, two = world.supervisor(), other.supervisor()
        assert one.installation != two.installation
        running(one)
        running(two)
        for supervisor in (one, two):
            for backend in supervisor.backends:
                supervisor.reconciler.sweep_soon(backend)
        time.sleep(0.2)
        assert len(alive(world)) == 2
        one.commands.remove("alice", keep_data=False)
        gone(one, "alice")
        assert two.queries.view("alice").state is State.RUNNING
        assert len(alive(world)) == 1
    finally:
        for supervisor in other.supervisors:
            end(supervisor)
        other.close()
