"""Moving an app to another provider is one line in the configuration, and every user's data is kept."""

import os

import pytest

from dispatcher.plugin.errors import Conflict, ProviderError
from dispatcher.manager.agents import restarts
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.files.manifest import differences
from dispatcher.manager.files.manifest import manifest as whole_manifest
from dispatcher.plugin.model import Capability
from dispatcher.plugin.names import backend_name
from dispatcher.manager.storage.rows import Desired
from tests.support.fake_backend import ALL
from tests.support.manager_world import end, gone, reach, running, until

OWN = ALL | {Capability.OWN_DATA}


@pytest.fixture
def world(world):
    world.away.capabilities = OWN
    return world


def move(world, supervisor, provider, name="alice"):
    world.app(provider=provider)
    supervisor.apply_config(world.config())
    supervisor.commands.restart(name)
    until(lambda: supervisor.queries.view(name).provider == provider and not supervisor.queries.view(name).move)
    return reach(supervisor, name, "running")


def manifest(directory):
    """What is there, without the file in which the pretended app notes that it was ended politely."""
    return {name: item for name, item in whole_manifest(directory).items() if name != "saved"}


def fill(directory, uid):
    (directory / "sub").mkdir()
    (directory / "sub/file").write_text("content")
    (directory / "sub/file").chmod(0o640)
    os.link(directory / "sub/file", directory / "hard")
    (directory / "link").symlink_to("sub/file")
    (directory / "dangling").symlink_to("/etc/shadow")
    (directory / "script").write_text("#!/bin/sh\n")
    (directory / "script").chmod(0o755)
    if os.geteuid() == 0:
        for path in directory.rglob("*"):
            os.chown(path, uid, uid, follow_symlinks=False)
    os.utime(directory / "sub/file", (1_600_000_000, 1_600_000_000))
    os.utime(directory / "sub", (1_500_000_000, 1_500_000_000))
    return manifest(directory)


def volume(world, supervisor, name="alice"):
    return world.away.volumes[backend_name(supervisor.installation, name)]


def test_there_and_back_again_with_owners_modes_links_and_times(world):
    supervisor = world.supervisor()
    running(supervisor)
    data = supervisor.data.data_dir("alice")
    before = fill(data, supervisor.queries.runtime("alice")["uid"])
    move(world, supervisor, "away")
    assert differences(before, manifest(volume(world, supervisor))) == []
    assert world.container(supervisor) is None
    assert [copy["provider"] for copy in supervisor.copies.list("alice")] == ["fake"]
    (volume(world, supervisor) / "later").write_text("written there")
    move(world, supervisor, "fake")
    after = manifest(data)
    later = after.pop("later")
    assert later.content
    assert differences(before, after) == []
    assert [(copy["provider"], copy["kind"]) for copy in supervisor.copies.list("alice")] == [
        ("fake", "directory"),
        ("away", "provider"),
    ]
    assert "moved" in [event.kind for event in supervisor.queries.events("alice", 20)]
    assert supervisor.copies.purge("alice") == 2
    assert supervisor.copies.list("alice") == []
    assert world.away.volumes == {}
    assert sorted(path.name for path in (data.parent / "copies").iterdir()) == []
    assert differences(before, {name: item for name, item in manifest(data).items() if name != "later"}) == []


def test_an_older_copy_is_saved_before_it_would_be_replaced(world):
    world.app(provider="away")
    supervisor = world.supervisor()
    running(supervisor)
    (volume(world, supervisor) / "note").write_text("first")
    move(world, supervisor, "fake")
    (supervisor.data.data_dir("alice") / "note").write_text("second")
    move(world, supervisor, "away")
    assert (volume(world, supervisor) / "note").read_text() == "second"
    old = [copy for copy in supervisor.store.copies("alice") if copy.provider == "away"]
    assert [copy.directory != "" for copy in old] == [True]
    kept = supervisor.data.copy_dir("alice", old[0].directory)
    assert (kept / "note").read_text() == "first"
    move(world, supervisor, "fake")
    assert (supervisor.data.data_dir("alice") / "note").read_text() == "second"
    assert len(supervisor.copies.list("alice")) == 3


def test_between_two_providers_that_use_the_directory_nothing_is_copied(world):
    world.away.capabilities = ALL
    supervisor = world.supervisor()
    running(supervisor)
    data = supervisor.data.data_dir("alice")
    before = fill(data, supervisor.queries.runtime("alice")["uid"])
    inode = data.stat().st_ino
    move(world, supervisor, "away")
    assert data.stat().st_ino == inode
    assert differences(before, manifest(data)) == []
    assert supervisor.copies.list("alice") == []
    assert world.container(supervisor) is None
    assert world.container(supervisor, backend=world.away).state == "running"


def test_between_two_providers_with_data_of_their_own(world):
    world.backend.capabilities = OWN
    supervisor = world.supervisor()
    running(supervisor)
    name = backend_name(supervisor.installation, "alice")
    before = fill(world.backend.volumes[name], supervisor.queries.runtime("alice")["uid"])
    move(world, supervisor, "away")
    assert differences(before, manifest(world.away.volumes[name])) == []
    assert differences(before, manifest(world.backend.volumes[name])) == []
    assert sorted(path.name for path in supervisor.data.data_dir("alice").parent.iterdir()) == ["data", "log"]


def test_until_its_next_start_an_agent_stays_where_it_is(world):
    supervisor = world.supervisor()
    running(supervisor)
    world.app(provider="away")
    changed = supervisor.apply_config(world.config())
    assert any("move at their next start" in sentence for sentence in changed)
    view = supervisor.queries.view("alice")
    assert (view.state, view.provider, view.outdated) == (State.RUNNING, "fake", True)
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    reach(supervisor, "alice", "suspended")
    supervisor.commands.wake("alice")
    assert reach(supervisor, "alice", "running").provider == "fake"
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    assert reach(supervisor, "alice", "stopped").provider == "fake"
    supervisor.commands.wake("alice")
    assert reach(supervisor, "alice", "running").provider == "away"


def test_an_agent_that_never_ran_just_starts_there(world):
    supervisor = world.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    world.app(provider="away")
    supervisor.apply_config(world.config())
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    assert reach(supervisor, "alice", "running").provider == "away"
    assert supervisor.copies.list("alice") == []


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("check", {"error": ProviderError("Too old")}),
        ("prepare", {"error": ProviderError("No image")}),
        ("import_data", {"error": ProviderError("No space")}),
        ("export_data", {"error": ValueError("broken")}),
    ],
)
def test_a_move_that_fails_leaves_the_old_place_intact_and_usable(world, method, fault):
    world.app(max_restarts=0)
    supervisor = world.supervisor()
    running(supervisor)
    data = supervisor.data.data_dir("alice")
    before = fill(data, supervisor.queries.runtime("alice")["uid"])
    world.away.inject(method, **fault)
    world.app(provider="away")
    supervisor.apply_config(world.config())
    supervisor.commands.restart("alice")
    view = reach(supervisor, "alice", "failed")
    assert view.provider == "fake"
    assert differences(before, manifest(data)) == []
    assert sorted(path.name for path in data.parent.iterdir()) == ["data", "log"]
    assert world.away.volumes == {}
    assert world.away.containers == {}
    assert any("could not be moved" in event.detail for event in supervisor.queries.events("alice", 20))
    world.app(provider="fake")
    supervisor.apply_config(world.config())
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "running")
    assert (view.provider, view.move) == ("fake", None)
    assert differences(before, manifest(data)) == []


def test_data_that_does_not_arrive_whole_is_noticed(world, monkeypatch):
    world.app(max_restarts=0)
    supervisor = world.supervisor()
    running(supervisor)
    data = supervisor.data.data_dir("alice")
    before = fill(data, supervisor.queries.runtime("alice")["uid"])
    from tests.support.fake_provider import FakeProvider

    def lossy(self, handle, directory, *, deadline, progress):
        good(self, handle, directory, deadline=deadline, progress=progress)
        (self.own_data(handle) / "sub/file").write_text("CONTENT")
        (self.own_data(handle) / "script").unlink()

    good = FakeProvider.import_data
    monkeypatch.setattr(FakeProvider, "import_data", lossy)
    world.app(provider="away")
    supervisor.apply_config(world.config())
    supervisor.commands.restart("alice")
    view = reach(supervisor, "alice", "failed")
    assert "did not arrive intact" in view.failure.what
    assert "script is missing" in view.failure.why
    assert "another content" in view.failure.why
    assert differences(before, manifest(data)) == []
    assert world.away.volumes == {}


def test_a_move_whose_target_is_away_is_tried_again(world, monkeypatch):
    monkeypatch.setattr(restarts, "UNAVAILABLE_RETRY", 0.3)
    supervisor = world.supervisor()
    running(supervisor)
    (supervisor.data.data_dir("alice") / "note").write_text("mine")
    world.away.down = True
    world.app(provider="away")
    supervisor.apply_config(world.config())
    supervisor.commands.restart("alice")
    view = reach(supervisor, "alice", "failed")
    assert "does not answer" in view.failure.what
    world.away.down = False
    view = reach(supervisor, "alice", "running", seconds=8)
    assert view.provider == "away"
    assert (volume(world, supervisor) / "note").read_text() == "mine"


def test_a_move_is_cancelled(world):
    supervisor = world.supervisor()
    running(supervisor)
    (supervisor.data.data_dir("alice") / "note").write_text("mine")
    world.away.inject("import_data", delay=20)
    world.app(provider="away")
    supervisor.apply_config(world.config())
    supervisor.commands.restart("alice")
    until(lambda: supervisor.queries.view("alice").stage == "waiting")
    assert supervisor.queries.view("alice").move.target == "away"
    assert any("moves from fake to away" in sentence for sentence in supervisor.queries.why("alice"))
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped", seconds=3)
    assert supervisor.queries.view("alice").provider == "fake"
    assert (supervisor.data.data_dir("alice") / "note").read_text() == "mine"
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    assert reach(supervisor, "alice", "running").provider == "away"


def test_copies_are_not_purged_while_something_is_done(world):
    supervisor = world.supervisor()
    running(supervisor)
    move(world, supervisor, "away")
    world.away.inject("stop", delay=0.5)
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    with pytest.raises(Conflict, match="busy"):
        supervisor.copies.purge("alice")
    reach(supervisor, "alice", "stopped")
    assert supervisor.copies.purge("alice") == 1


def test_old_copies_go_with_their_agent(world):
    world.app(provider="away")
    supervisor = world.supervisor()
    running(supervisor)
    move(world, supervisor, "fake")
    assert len(world.away.volumes) == 1
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice")
    assert world.away.volumes == {}
    assert supervisor.store.copies("alice") == []
    assert not supervisor.data.paths.agent_dir("alice").exists()


def test_data_kept_on_another_provider_moves_to_the_new_agent(world):
    world.app(provider="away")
    supervisor = world.supervisor()
    running(supervisor)
    (volume(world, supervisor) / "note").write_text("kept")
    supervisor.commands.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    world.app(provider="fake")
    supervisor.apply_config(world.config())
    running(supervisor)
    assert (supervisor.data.data_dir("alice") / "note").read_text() == "kept"
    end(supervisor)
    assert world.supervisor().queries.view("alice").state is State.RUNNING


@pytest.mark.root
def test_what_a_guest_made_dangerous_is_harmless_in_the_directory(world):
    world.app(provider="away")
    supervisor = world.supervisor()
    running(supervisor)
    evil = volume(world, supervisor) / "evil"
    evil.write_text("#!/bin/sh\n")
    evil.chmod(0o6755)
    move(world, supervisor, "fake")
    found = (supervisor.data.data_dir("alice") / "evil").stat()
    assert found.st_uid == supervisor.queries.runtime("alice")["uid"]
    assert found.st_mode & 0o6000 == 0


def test_a_reset_in_the_middle_of_tidying_up_keeps_the_old_copy(world):
    from tests.support.manager_world import Crash

    old = world.supervisor()
    running(old)
    (old.data.data_dir("alice") / "note").write_text("mine")
    world.app(provider="away")
    old.apply_config(world.config())
    crash = Crash(world, old, "tidying up", "move")
    old.commands.restart("alice")
    crash.happen()
    world.app(provider="away")
    new = world.supervisor(start=False)
    new.registry.on_step = lambda *_: None
    import dataclasses

    from dispatcher.manager.storage.rows import Pending

    row = new.store.agents()[0]
    new.store.save([dataclasses.replace(row, pending=Pending.RESET, version=row.version + 1)])
    new.start()
    until(lambda: "reset" in [event.kind for event in new.queries.events("alice", 20)])
    reach(new, "alice", "running")
    (copy,) = new.store.copies("alice")
    assert (new.data.copy_dir("alice", copy.directory) / "note").read_text() == "mine"
    assert manifest(volume(world, new)) == {}
    crash.release()
