"""Kept data is listed and purged by its agent's name, also when the agent is gone; live data never is."""

import threading

import pytest

from dispatcher.plugin.errors import Conflict, NotFound, Unavailable
from dispatcher.plugin.model import Capability
from dispatcher.testing.fake_backend import ALL
from tests.support.manager_world import end, gone, reach, running, until

OWN = ALL | {Capability.OWN_DATA}


def keep(supervisor, text="kept"):
    """Run alice, write something, remove alice with the data kept; return the agent's directory."""
    running(supervisor)
    home = supervisor._data.paths.agent_dir("alice")
    (home / "data/note").write_text(text)
    supervisor.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    return home


def test_kept_data_of_a_removed_agent_is_listed_and_purged(world):
    supervisor = world.supervisor()
    home = keep(supervisor, "x" * 100_000)
    (copy,) = supervisor.copies("alice")
    assert (copy["provider"], copy["kind"]) == ("fake", "directory")
    assert copy["size"] >= 100_000
    assert "removed" in copy["why"]
    assert copy["time"]
    assert supervisor.purge_copies("alice") == 1
    assert not home.exists()
    for ask in (supervisor.copies, supervisor.purge_copies):
        with pytest.raises(NotFound):
            ask("alice")
    running(supervisor)
    assert "kept" not in supervisor.events("alice", 10)[0].detail


@pytest.mark.root
def test_the_user_id_is_free_after_a_purge(world):
    supervisor = world.supervisor()
    running(supervisor)
    uid = supervisor.runtime("alice")["uid"]
    supervisor.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    assert supervisor.store.is_taken(uid)
    supervisor.purge_copies("alice")
    assert not supervisor.store.is_taken(uid)


def test_kept_data_that_a_provider_holds_is_destroyed_there_after_a_restart_too(world):
    world.app(provider="away")
    world.away.capabilities = OWN
    first = world.supervisor()
    keep(first)
    assert len(world.away.volumes) == 1
    end(first)
    supervisor = world.supervisor()
    (copy,) = supervisor.copies("alice")
    assert (copy["provider"], copy["kind"], copy["size"]) == ("away", "provider", None)
    world.away.down = True
    with pytest.raises(Unavailable):
        supervisor.purge_copies("alice")
    assert len(supervisor.copies("alice")) == 1
    world.away.down = False
    assert supervisor.purge_copies("alice") == 1
    assert world.away.volumes == {}


def test_old_copies_of_a_removed_agent_go_with_its_kept_data(world):
    world.away.capabilities = OWN
    supervisor = world.supervisor()
    running(supervisor)
    (supervisor._data.data_dir("alice") / "note").write_text("mine")
    world.app(provider="away")
    supervisor.apply_config(world.config())
    supervisor.restart("alice")
    supervisor.wait("alice", lambda view: view.provider == "away" and view.state.value == "running", 10)
    (copy,) = supervisor.copies("alice")
    assert "moved" in copy["why"]
    assert copy["kind"] == "directory"
    supervisor.remove("alice", keep_data=True)
    gone(supervisor, "alice")
    assert [copy["kind"] for copy in supervisor.copies("alice")] == ["directory", "provider"]
    assert supervisor.purge_copies("alice") == 2
    assert world.away.volumes == {}
    assert not supervisor._data.paths.agent_dir("alice").exists()


def test_live_data_is_never_purged(world):
    supervisor = world.supervisor()
    keep(supervisor)
    running(supervisor)  # a new agent of the name has the kept data now: it is live
    note = supervisor._data.data_dir("alice") / "note"
    assert supervisor.copies("alice") == []
    assert supervisor.purge_copies("alice") == 0
    assert note.read_text() == "kept"
    supervisor.set_desired("alice", "stopped")
    reach(supervisor, "alice", "stopped")
    assert supervisor.purge_copies("alice") == 0
    assert note.read_text() == "kept"


def test_nobody_gets_the_name_while_its_kept_data_is_purged(world):
    supervisor = world.supervisor()
    keep(supervisor)
    world.backend.calls.clear()
    world.backend.inject("destroy", delay=1.0)
    purged = []
    thread = threading.Thread(target=lambda: purged.append(supervisor.purge_copies("alice")))
    thread.start()
    until(lambda: "destroy" in [call[0] for call in world.backend.calls])
    with pytest.raises(Conflict, match="being removed"):
        supervisor.create("alice", app=None, password_hash="hash")
    with pytest.raises(Conflict, match="busy"):
        supervisor.purge_copies("alice")
    thread.join()
    assert purged == [1]
    running(supervisor)
    assert not (supervisor._data.data_dir("alice") / "note").exists()
