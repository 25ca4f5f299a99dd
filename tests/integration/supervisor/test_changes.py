"""What befalls agents: death, another configuration, a sign-in whose credentials they get."""

import pytest

from dispatcher.plugin.errors import BadRequest, ConfigError
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.backends.backend import Backend
from dispatcher.plugin.model import Capability
from dispatcher.manager.storage.rows import Desired
from tests.support.fake_backend import ALL
from tests.support.manager_world import gone, kinds, reach, running, until


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
        next(event for event in supervisor.queries.events("alice", 10) if event.kind == "died").detail
        == "killed by signal 9"
    )
    assert any(
        "It last exited" in sentence and "killed by signal 9" in sentence
        for sentence in supervisor.queries.why("alice")
    )


def test_without_events_the_edge_s_suspicion_finds_a_dead_agent(world):
    world.backend.capabilities = ALL - {Capability.EVENTS}
    supervisor = world.supervisor()
    running(supervisor)
    world.kill(supervisor)
    supervisor.reconciler.check_endpoint("alice")
    until(lambda: "died" in kinds(supervisor))
    reach(supervisor, "alice", "running")


def test_an_app_that_ends_again_and_again_is_given_up_with_its_last_lines(world):
    world.app(environment={"PROBE_EXIT": "3"}, max_restarts=2)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed", seconds=5)
    assert view.failure.what == "The app ended before it was ready"
    assert view.failure.why == "exit code 3"
    assert view.failure.log == ("last words",)
    assert "next try" in view.detail
    until(
        lambda: (
            supervisor.registry.find("alice").row.retry_at is None and supervisor.queries.view("alice").failure
        ),
        10,
    )
    assert world.backend.calls.count(("ensure", "alice")) == 3
    supervisor.commands.wake("alice")  # a page that reloads itself
    assert supervisor.queries.view("alice").state is State.FAILED
    told = "\n".join(supervisor.queries.why("alice"))
    assert "gave up after 3 tries" in told
    assert "last words" in told
    supervisor.commands.set_desired("alice", Desired.RUNNING)  # somebody means it
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
    assert supervisor.registry.find("alice").row.retry_at is None


def test_an_app_that_stops_listening_is_started_again(world):
    world.app(start_timeout=0.5)
    supervisor = world.supervisor()
    running(supervisor)
    app = world.container(supervisor).app
    app._listener.shutdown(2)
    app._listener.close()
    supervisor.reconciler.check_endpoint("alice")
    until(lambda: supervisor.queries.view("alice").feed_state == "starting", 2)
    until(lambda: world.container(supervisor).app is not app, 8)
    reach(supervisor, "alice", "running", seconds=5)


def test_something_that_ends_while_it_sleeps_stays_away_until_somebody_comes(world, supervisor):
    running(supervisor)
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    world.kill(supervisor)
    view = reach(supervisor, "alice", "stopped")
    assert view.feed_state == "asleep"
    supervisor.commands.wake("alice")
    reach(supervisor, "alice", "running")


# --- the configuration changes


def test_another_configuration_makes_agents_outdated_and_a_restart_renews_them(world, supervisor):
    running(supervisor)
    world.app(environment={"COLOUR": "blue"})
    changed = supervisor.apply_config(world.config())
    assert any("demo has changed: environment" in sentence for sentence in changed)
    assert any("outdated" in sentence for sentence in changed)
    view = supervisor.queries.view("alice")
    assert view.outdated
    assert view.state is State.RUNNING
    assert kinds(supervisor)[-1] == "outdated"
    assert any("dispatcher restart alice" in sentence for sentence in supervisor.queries.why("alice"))
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    supervisor.commands.wake("alice")  # waking keeps the memory, so it stays as it was
    assert reach(supervisor, "alice", "running").outdated
    supervisor.commands.restart("alice")
    until(lambda: not supervisor.queries.view("alice").outdated)
    reach(supervisor, "alice", "running")
    assert world.container(supervisor).app.environment["COLOUR"] == "blue"


def test_an_app_that_goes_can_be_stopped_and_removed_but_not_started(world, supervisor):
    running(supervisor)
    running(supervisor, "bob")
    world.data["apps"] = {"other": {"provider": "fake", "fake": {}}}
    changed = supervisor.apply_config(world.config())
    assert any("demo was removed" in sentence for sentence in changed)
    assert supervisor.queries.view("alice").state is State.RUNNING
    [told] = [each for each in supervisor.queries.why("alice") if "no longer configured" in each]
    assert "`dispatcher add alice --app APP`" in told
    assert "`dispatcher remove alice`" in told
    with pytest.raises(ConfigError, match="There is no app 'demo'"):
        supervisor.commands.restart("alice")
    assert supervisor.queries.view("alice").state is State.RUNNING, "what cannot start again is not stopped"
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed")
    assert "no app" in view.failure.what
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    supervisor.commands.remove("bob", keep_data=False)
    gone(supervisor, "bob")


def test_a_fault_of_the_configuration_is_final_until_it_changes(world):
    world.app(fake={"image": "missing"}, max_restarts=0)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    assert "no image" in reach(supervisor, "alice", "failed").failure.what
    world.app(fake={})
    supervisor.apply_config(world.config())
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")


def test_a_change_that_breaks_off_leaves_the_earlier_configuration_in_use(world, supervisor, monkeypatch):
    running(supervisor)
    faults = [RuntimeError("no thread can be started")]

    def use(backend, made, real=Backend.use):
        if faults:
            raise faults.pop()
        return real(backend, made)

    monkeypatch.setattr(Backend, "use", use)
    world.app(environment={"COLOUR": "blue"})
    world.data["providers"] = {**world.data["providers"], "fake": {"backend": f"other-{world.number}"}}
    with pytest.raises(RuntimeError, match="no thread"):
        supervisor.apply_config(world.config())
    assert not supervisor.queries.view("alice").outdated
    running(supervisor, "bob")
    assert len(world.backend.containers) == 2, "of the provider with the earlier options"
    assert "COLOUR" not in world.container(supervisor, "bob").app.environment


def test_a_wrong_configuration_changes_nothing(world, supervisor):
    running(supervisor)
    world.app(fake={"imagge": "x"})
    with pytest.raises(BadRequest):
        supervisor.apply_config(world.config())
    assert not supervisor.queries.view("alice").outdated


# --- credentials


def test_an_app_that_takes_the_login_starts_only_at_a_sign_in(world):
    world.app(credentials="stdin", max_restarts=5)
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.wake("alice")
    view = reach(supervisor, "alice", "failed")
    assert "sign-in" in view.failure.what
    supervisor.commands.set_desired("alice", Desired.RUNNING, stdin=b'{"password": "s3cret"}\n')
    reach(supervisor, "alice", "running")
    assert world.container(supervisor).app.stdin == b'{"password": "s3cret"}\n'
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    supervisor.commands.wake("alice")
    reach(supervisor, "alice", "running")
    world.kill(supervisor)
    view = reach(supervisor, "alice", "failed")
    assert "sign out and sign in" in view.failure.fix
    stored = (world.directory / "state/dispatcher.db").read_bytes()
    assert b"s3cret" not in stored


def test_a_sign_in_to_a_running_app_leaves_no_password_for_later(world):
    """Its next start would take it, long after whoever signed in has signed out."""
    world.app(credentials="stdin", max_restarts=5)
    supervisor = world.supervisor()
    running = {"desired": Desired.RUNNING, "stdin": b'{"password": "s3cret"}\n'}
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.set_desired("alice", **running)
    reach(supervisor, "alice", "running")
    supervisor.commands.set_desired("alice", **running)
    assert supervisor.registry.find("alice").stdin is None
    world.kill(supervisor)
    view = reach(supervisor, "alice", "failed")
    assert "sign-in" in view.failure.what
    supervisor.commands.set_desired("alice", **running)
    reach(supervisor, "alice", "running")
