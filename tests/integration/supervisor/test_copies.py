"""Kept data is listed and purged by its agent's name, also when the agent is gone; live data never is."""

import threading

import pytest

from dispatcher.plugin.errors import Conflict, NotFound, Unavailable
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin.model import Capability
from tests.support.fake_backend import ALL
from tests.support.manager_world import end, gone, reach, running, until

OWN = ALL | {Capability.OWN_DATA}


def keep(supervisor, text="kept"):
    """Run alice, write something, remove alice with the data kept; return the agent's directory."""
    running(supervisor)
    home = supervisor.data.paths.agent_dir("alice")
    (home / "data/note").write_text(text)
    supervisor.commands.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    return home


def test_kept_data_of_a_removed_agent_is_listed_and_purged(world):
    supervisor = world.supervisor()
    home = keep(supervisor, "x" * 100_000)
    (copy,) = supervisor.copies.list("alice")
    assert (copy["provider"], copy["kind"]) == ("fake", "directory")
    assert copy["size"] >= 100_000
    assert "removed" in copy["why"]
    assert copy["time"]
    assert supervisor.copies.purge("alice") == 1
    assert not home.exists()
    for ask in (supervisor.copies.list, supervisor.copies.purge):
        with pytest.raises(NotFound):
            ask("alice")
    running(supervisor)
    assert "kept" not in supervisor.queries.events("alice", 10)[0].detail


@pytest.mark.root
def test_the_user_id_is_free_after_a_purge(world):
    supervisor = world.supervisor()
    running(supervisor)
    uid = supervisor.queries.runtime("alice")["uid"]
    supervisor.commands.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    assert supervisor.store.is_taken(uid)
    supervisor.copies.purge("alice")
    assert not supervisor.store.is_taken(uid)


def test_kept_data_that_a_provider_holds_is_destroyed_there_after_a_restart_too(world):
    world.app(provider="away")
    world.away.capabilities = OWN
    first = world.supervisor()
    keep(first)
    assert len(world.away.volumes) == 1
    end(first)
    supervisor = world.supervisor()
    (copy,) = supervisor.copies.list("alice")
    assert (copy["provider"], copy["kind"], copy["size"]) == ("away", "provider", None)
    world.away.down = True
    with pytest.raises(Unavailable):
        supervisor.copies.purge("alice")
    assert len(supervisor.copies.list("alice")) == 1
    world.away.down = False
    assert supervisor.copies.purge("alice") == 1
    assert world.away.volumes == {}


def test_old_copies_of_a_removed_agent_go_with_its_kept_data(world):
    world.away.capabilities = OWN
    supervisor = world.supervisor()
    running(supervisor)
    (supervisor.data.data_dir("alice") / "note").write_text("mine")
    world.app(provider="away")
    supervisor.apply_config(world.config())
    supervisor.commands.restart("alice")
    supervisor.queries.wait("alice", lambda view: view.provider == "away" and view.state.value == "running", 10)
    (copy,) = supervisor.copies.list("alice")
    assert "moved" in copy["why"]
    assert copy["kind"] == "directory"
    supervisor.commands.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    assert [copy["kind"] for copy in supervisor.copies.list("alice")] == ["directory", "provider"]
    assert supervisor.copies.purge("alice") == 2
    assert world.away.volumes == {}
    assert not supervisor.data.paths.agent_dir("alice").exists()


def test_live_data_is_never_purged(world):
    supervisor = world.supervisor()
    keep(supervisor)
    running(supervisor)  # a new agent of the name has the kept data now: it is live
    note = supervisor.data.data_dir("alice") / "note"
    assert supervisor.copies.list("alice") == []
    assert supervisor.copies.purge("alice") == 0
    assert note.read_text() == "kept"
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    assert supervisor.copies.purge("alice") == 0
    assert note.read_text() == "kept"


def test_nobody_gets_the_name_while_its_kept_data_is_purged(world):
    supervisor = world.supervisor()
    keep(supervisor)
    world.backend.calls.clear()
    world.backend.inject("destroy", delay=1.0)
    purged = []
    thread = threading.Thread(target=lambda: purged.append(supervisor.copies.purge("alice")))
    thread.start()
    until(lambda: "destroy" in [call[0] for call in world.backend.calls])
    with pytest.raises(Conflict, match="being removed"):
        supervisor.commands.create("alice", app=None, password_hash="hash")
    with pytest.raises(Conflict, match="busy"):
        supervisor.copies.purge("alice")
    thread.join()
    assert purged == [1]
    running(supervisor)
    assert not (supervisor.data.data_dir("alice") / "note").exists()
