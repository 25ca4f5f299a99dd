"""Agents that come and go, and what becomes of their data."""

import errno
import os
import shutil

import pytest

from dispatcher.plugin.errors import BadRequest, Conflict, NotFound, ProviderError, Unavailable
from dispatcher.manager.storage.rows import Desired
from dispatcher.manager.agents import registry
from dispatcher.manager.agents.lifecycle import State
from tests.support.manager_world import end, gone, kinds, reach, running, until


# --- coming and going


def test_a_new_agent_is_stopped_and_its_user_exists(supervisor):
    row = supervisor.commands.create("Alice", app=None, password_hash="hash")
    assert (row.name, row.user, row.app) == ("alice", "alice", "demo")
    view = supervisor.queries.view("alice")
    assert (view.state, view.feed_state, view.last_used) == (State.STOPPED, "asleep", None)
    assert supervisor.store.get_user("alice").password_hash == "hash"
    assert [view.name for view in supervisor.queries.views()] == ["alice"]
    assert kinds(supervisor) == ["created"]


def test_the_same_name_twice_is_a_conflict_and_changes_nothing(supervisor):
    supervisor.commands.create("alice", app=None, password_hash="hash")
    with pytest.raises(Conflict, match="exists"):
        supervisor.commands.create("ALICE", app=None, password_hash=None)
    with pytest.raises(Conflict):
        supervisor.commands.create("alice:demo", app=None, password_hash="other")
    assert supervisor.store.get_user("alice").password_hash == "hash"


def test_a_second_agent_is_called_after_its_app(world):
    world.data["apps"]["lab"] = {"provider": "fake", "fake": {}}
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app="demo", password_hash="hash")
    assert supervisor.commands.create("alice", app="lab", password_hash=None).name == "alice:lab"
    assert [view.name for view in supervisor.queries.views(user="alice")] == ["alice", "alice:lab"]
    assert supervisor.queries.views(user="bob") == []
    with pytest.raises(Conflict):
        supervisor.commands.create("alice", app="lab", password_hash=None)


@pytest.mark.parametrize(
    ("name", "app"),
    [("", None), ("a/b", None), ("alice:demo", "lab"), ("alice", "nothing"), ("alice:nothing", None)],
)
def test_bad_names_and_apps_are_refused_and_nothing_is_made(supervisor, name, app):
    with pytest.raises(BadRequest):
        supervisor.commands.create(name, app=app, password_hash="hash")
    assert supervisor.queries.views() == []
    assert supervisor.store.users() == []


def test_with_several_apps_and_no_default_one_must_be_named(world):
    world.data["apps"] = {"one": {"provider": "fake", "fake": {}}, "two": {"provider": "fake", "fake": {}}}
    supervisor = world.supervisor()
    with pytest.raises(BadRequest) as caught:
        supervisor.commands.create("alice", app=None, password_hash="hash")
    assert str(caught.value).startswith("There are several apps and no default: one, two (name one ")
    assert supervisor.commands.create("alice", app="two", password_hash="hash").app == "two"


def test_without_any_app_it_says_what_to_write(world):
    world.data["apps"] = {}
    with pytest.raises(BadRequest, match=r"No app is configured \(write an \[apps.NAME\] section"):
        world.supervisor().commands.create("alice", app=None, password_hash="hash")


def test_what_is_not_there_is_not_found(supervisor):
    for call in (
        lambda: supervisor.queries.view("nobody"),
        lambda: supervisor.commands.set_desired("nobody", Desired.RUNNING),
        lambda: supervisor.commands.remove("nobody", keep_data=False),
        lambda: supervisor.commands.restart("nobody"),
        lambda: supervisor.commands.reset_data("nobody"),
        lambda: supervisor.queries.why("nobody"),
        lambda: supervisor.queries.logs("nobody", tail=1, after=None),
        lambda: supervisor.queries.wait("nobody", lambda view: True, 1),
    ):
        with pytest.raises(NotFound):
            call()
    supervisor.commands.wake("nobody")
    supervisor.commands.record_activity("nobody", {"use": 1})
    supervisor.reconciler.check_endpoint("nobody")


def test_a_removed_agent_is_gone_with_its_user_and_its_data(world, supervisor):
    running(supervisor)
    data = supervisor.data.data_dir("alice")
    (data / "note").write_text("secret")
    told = []
    supervisor.registry.subscribe(told.append)
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    assert supervisor.store.get_user("alice") is None
    assert not world.backend.containers
    assert not data.parent.exists()
    assert not supervisor.data.paths.endpoint_dir("alice").exists()
    assert told
    with pytest.raises(NotFound):
        supervisor.queries.view("alice")


def test_a_user_stays_while_another_agent_is_left(world):
    world.data["apps"]["lab"] = {"provider": "fake", "fake": {}}
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app="demo", password_hash="hash")
    supervisor.commands.create("alice", app="lab", password_hash=None)
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    assert supervisor.store.get_user("alice") is not None
    supervisor.commands.remove("alice:lab", keep_data=False)
    gone(supervisor, "alice:lab")
    assert supervisor.store.get_user("alice") is None


def test_an_agent_that_is_being_removed_takes_no_other_wishes(world, supervisor):
    running(supervisor)
    world.backend.inject("stop", delay=1)
    supervisor.commands.remove("alice", keep_data=False)
    assert supervisor.queries.view("alice").state is State.REMOVING
    for call in (
        lambda: supervisor.commands.set_desired("alice", Desired.RUNNING),
        lambda: supervisor.commands.restart("alice"),
        lambda: supervisor.commands.reset_data("alice"),
        lambda: supervisor.commands.create("alice", app=None, password_hash=None),
    ):
        with pytest.raises(Conflict, match="being removed"):
            call()
    with pytest.raises(Conflict) as caught:  # as `dispatcher add` with a password for a user who still exists
        supervisor.commands.check_not_being_removed("alice")
    assert "`dispatcher why alice` says how far the removal is" in caught.value.fix
    supervisor.commands.wake("alice")
    gone(supervisor, "alice")


def test_a_removal_that_fails_is_the_reason_why_the_name_is_taken(world, supervisor):
    running(supervisor)
    world.backend.inject("stop", error=ProviderError("Device busy"), times=1)
    supervisor.commands.remove("alice", keep_data=False)
    until(lambda: supervisor.queries.view("alice").failure)
    with pytest.raises(Conflict, match="being removed") as caught:
        supervisor.commands.create("alice", app=None, password_hash=None)
    assert "Device busy" in caught.value.why
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")


# --- data left behind


def test_add_after_remove_has_none_of_the_old_data(supervisor):
    running(supervisor)
    (supervisor.data.data_dir("alice") / "note").write_text("old")
    first = supervisor.queries.runtime("alice")["uid"]
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    running(supervisor)
    assert list(supervisor.data.data_dir("alice").iterdir()) == []
    if os.geteuid() == 0:
        assert supervisor.queries.runtime("alice")["uid"] != first


def test_kept_data_returns_to_the_same_name_only_and_is_reported(supervisor):
    running(supervisor)
    (supervisor.data.data_dir("alice") / "note").write_text("kept")
    uid = supervisor.queries.runtime("alice")["uid"]
    supervisor.commands.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    running(supervisor, "bob")
    if os.geteuid() == 0:
        assert supervisor.queries.runtime("bob")["uid"] != uid
    assert not (supervisor.data.data_dir("bob") / "note").exists()
    running(supervisor)
    assert (supervisor.data.data_dir("alice") / "note").read_text() == "kept"
    assert supervisor.queries.runtime("alice")["uid"] == uid
    assert "was kept" in supervisor.queries.events("alice", 10)[0].detail
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    running(supervisor)
    assert not (supervisor.data.data_dir("alice") / "note").exists()


def test_a_lost_database_empties_no_home(world):
    old = world.supervisor()
    for name in ("alice", "bob"):
        running(old, name)
        (old.data.data_dir(name) / "note").write_text(name)
    uids = {name: old.queries.runtime(name)["uid"] for name in ("alice", "bob")}
    end(old)
    for path in (world.directory / "state").glob("dispatcher.db*"):
        path.unlink()
    new = world.supervisor()
    running(new, "carol")  # gets no id that owns data of others
    running(new, "alice")
    running(new, "bob")
    for name in ("alice", "bob"):
        note = new.data.data_dir(name) / "note"
        assert note.read_text() == name
        assert note.parent.stat().st_uid == new.queries.runtime(name)["uid"]
        assert "the database did not know" in new.queries.events(name, 10)[0].detail
        if os.geteuid() == 0:
            assert new.queries.runtime(name)["uid"] == uids[name]
    if os.geteuid() == 0:
        assert new.queries.runtime("carol")["uid"] not in uids.values()


def test_data_that_is_missing_is_told_and_not_replaced_by_an_empty_home(world):
    supervisor = world.supervisor()
    running(supervisor)
    supervisor.commands.record_activity("alice", {"use": 1})
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    data = supervisor.data.data_dir("alice")
    data.rename(data.with_name("elsewhere"))
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    failure = reach(supervisor, "alice", "failed").failure
    assert failure.what == "The data of 'alice' is missing"
    assert str(data) in failure.why
    assert "reset-data" in failure.fix
    assert not data.exists()
    data.with_name("elsewhere").rename(data)
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    shutil.rmtree(data)
    supervisor.commands.reset_data("alice")
    until(lambda: "reset" in kinds(supervisor))
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running")


def test_reset_deletes_the_data_and_starts_again_what_ran(supervisor):
    running(supervisor)
    data = supervisor.data.data_dir("alice")
    (data / "note").write_text("old")
    supervisor.commands.reset_data("alice")
    until(lambda: "reset" in kinds(supervisor))
    reach(supervisor, "alice", "running")
    assert list(data.iterdir()) == []
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    (data / "note").write_text("old")
    supervisor.commands.reset_data("alice")
    until(lambda: kinds(supervisor).count("reset") == 2)
    assert reach(supervisor, "alice", "stopped").desired.value == "stopped"
    assert list(data.iterdir()) == []


@pytest.mark.parametrize("deed", ["reset", "remove"])
def test_data_that_cannot_be_deleted_is_a_failure_that_names_it(supervisor, monkeypatch, deed):
    running(supervisor)
    (supervisor.data.data_dir("alice") / "protected").write_text("x")
    (supervisor.data.data_dir("alice") / "other").write_text("x")
    unlink, protected = os.unlink, [True]

    def refuse(name, **options):
        if name == "protected" and protected:
            raise PermissionError(errno.EPERM, "Operation not permitted", name)
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    if deed == "reset":
        supervisor.commands.reset_data("alice")
    else:
        supervisor.commands.remove("alice", keep_data=False)
    until(lambda: "failed" in kinds(supervisor))
    view = supervisor.queries.view("alice")
    assert view.state is (State.FAILED if deed == "reset" else State.REMOVING)
    assert "'protected': Operation not permitted" in view.failure.why
    assert "reset" not in kinds(supervisor)
    state = supervisor.data.paths.state_dir
    assert [path.name for path in state.rglob("*") if path.name in {"protected", "other"}] == ["protected"]
    protected.clear()
    if deed == "reset":
        supervisor.commands.reset_data("alice")
        until(lambda: "reset" in kinds(supervisor))
    else:
        supervisor.commands.remove("alice", keep_data=False)
        gone(supervisor, "alice")
    assert not [path for path in state.rglob("protected")]


@pytest.mark.root
def test_directories_belong_to_whom_they_should(supervisor):
    running(supervisor)
    runtime = supervisor.queries.runtime("alice")
    data, endpoint = supervisor.data.data_dir("alice"), supervisor.data.paths.endpoint_dir("alice")

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
    uids = {supervisor.commands.create(f"user{number}", app=None, password_hash="h").uid for number in range(30)}
    assert len(uids) == 30
    assert all(300_001 <= uid <= 300_999 for uid in uids)


@pytest.mark.root
def test_when_no_user_id_is_left_that_is_said(world, supervisor):
    supervisor.commands._uids._range = (300_001, 300_002)
    supervisor.commands.create("a", app=None, password_hash="h")
    supervisor.commands.create("b", app=None, password_hash="h")
    with pytest.raises(Conflict, match="No host user id"):
        supervisor.commands.create("c", app=None, password_hash="h")
    supervisor.commands.remove("a", keep_data=False)
    gone(supervisor, "a")
    supervisor.commands.create("c", app=None, password_hash="h")


def test_a_removal_is_reported_when_it_is_written_and_when_the_agent_is_gone(supervisor, world):
    running(supervisor)
    reported = []

    def on_removal(name, user):
        stored = {row.name: row.desired for row in supervisor.store.agents()}
        reported.append((name, user, stored.get(name), world.container(supervisor) is not None))

    supervisor.registry.on_removal(on_removal)
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    until(lambda: len(reported) == 2)
    assert reported == [("alice", "alice", Desired.ABSENT, True), ("alice", "alice", None, False)]


def test_a_subscriber_to_removals_that_fails_is_called_again_until_it_succeeds(supervisor, monkeypatch):
    monkeypatch.setattr(registry, "REPEAT", 0.05)
    running(supervisor)
    calls, others = [], []

    def fails_at_first(*agent):
        calls.append(agent)
        if len(calls) < 5:
            raise RuntimeError("broken")

    supervisor.registry.on_removal(fails_at_first)
    supervisor.registry.on_removal(lambda *agent: others.append(agent))
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    until(lambda: len(calls) >= 6)
    assert set(calls) == {("alice", "alice")}
    assert len(others) == 2, "only what failed is called again"


def test_a_removal_that_cannot_be_written_is_not_reported(supervisor, monkeypatch):
    running(supervisor)
    reported = []
    supervisor.registry.on_removal(lambda *agent: reported.append(agent))

    def full(*_args):
        raise Unavailable("The database cannot be used now", why="disk full")

    monkeypatch.setattr(supervisor.store, "save", full)
    with pytest.raises(Unavailable):
        supervisor.commands.remove("alice", keep_data=False)
    assert reported == []
    assert supervisor.queries.view("alice").desired is Desired.RUNNING


def test_a_name_with_an_apostrophe_is_a_name(supervisor):
    supervisor.commands.create("O'Brien@uni.example", app=None, password_hash="hash")
    supervisor.commands.set_desired("o'brien@uni.example", Desired.RUNNING)
    reach(supervisor, "o'brien@uni.example", State.RUNNING)
    supervisor.commands.remove("o'brien@uni.example", keep_data=False)
    gone(supervisor, "o'brien@uni.example")
