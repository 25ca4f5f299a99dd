"""Rows in, rows out; the newest row wins; what cannot be written raises."""

import dataclasses
import sqlite3

import pytest

from dispatcher.plugin.deadline import boot_id
from dispatcher.plugin.errors import Conflict, NotFound, Unavailable
from dispatcher.manager.storage import agents as module
from dispatcher.manager.storage.auth import AuthStore, SessionRow, Visitor
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.rows import Desired, Kind, Pending
from dispatcher.manager.storage.agents import Store, steady_clock
from dispatcher.manager.storage.rows import AgentRow, BackendRow, CopyRow, Failure, KeptRow, Move
from dispatcher.plugin.model import AgentEvent, BackendState


@pytest.fixture
def store(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/test.db")
    database.open()
    yield Store(database)
    database.close()


def row(name="alice", **more):
    return AgentRow(
        **{
            "id": 0,
            "version": 1,
            "name": name,
            "user": name.partition(":")[0],
            "user_id": 0,
            "app": "demo",
            "provider": "fake",
            "uid": 1000,
            "created": 5.0,
            "since": 5.0,
            **more,
        }
    )


def made(store, name="alice", **more):
    return store.create(row(name, **more), password_hash="hash", allocated=False, events=[])


def event(kind, time=1.0):
    return AgentEvent(time=time, agent="alice", user="alice", app="demo", kind=kind, detail="why")


FULL = {
    "desired": Desired.RUNNING,
    "keep_data": True,
    "pending": Pending.RESET,
    "handle": '{"x": 1}',
    "observed": BackendState.RUNNING,
    "observed_at": 6.0,
    "ready": True,
    "endpoint": "unix:/x",
    "owner_uid": 7,
    "started_at": 8.0,
    "spec_hash": "abc",
    "exit_reason": "exit code 1",
    "operation": Kind.MOVE,
    "step": "exporting",
    "operation_since": 9.0,
    "failure": Failure(what="w", why="y", fix="f", log=("a", "b"), time=3.0, final=True),
    "attempts": (1.0, 2.0),
    "retry_at": 10.0,
    "move": Move(source="a", target="b", step="exporting", since=1.0, handle="h", copy="c", install=True),
    "last_used": 11.0,
}


def test_a_row_comes_back_as_it_was(store):
    assert set(FULL) | {
        "id",
        "version",
        "name",
        "user",
        "user_id",
        "app",
        "provider",
        "uid",
        "created",
        "since",
    } == {field.name for field in dataclasses.fields(AgentRow)}
    first = made(store, **FULL)
    assert store.agents() == [first]
    changed = dataclasses.replace(first, version=2, failure=None, move=None, attempts=(), operation=None)
    store.save([changed])
    assert store.agents() == [changed]


def test_an_older_row_never_replaces_a_newer_one(store):
    first = made(store)
    store.save([dataclasses.replace(first, version=5, step="new")])
    store.save([dataclasses.replace(first, version=4, step="old")])
    assert store.agents()[0].step == "new"


def test_the_user_is_made_once_and_goes_with_the_last_agent(store):
    one, two = made(store, "alice"), made(store, "alice:lab")
    assert one.user_id == two.user_id
    assert [user.name for user in store.users()] == ["alice"]
    assert store.remove(one, kept=None, events=[event("removed")]) is False
    assert store.get_user("alice") is not None
    assert store.remove(two, kept=None, events=[]) is True
    assert store.get_user("alice") is None


def test_a_user_of_an_old_name_has_a_new_id_and_no_known_browser(store):
    auth = AuthStore(store.database)
    first = made(store)
    session = SessionRow(
        sha256="0" * 64, user="alice", user_id=first.user_id, agent="alice", created=1.0, last_used=1.0
    )
    auth.add_session(session, Visitor(), device="1" * 64)
    assert auth.has_device("1" * 64, first.user_id)
    assert store.remove(first, kept=None, events=[])
    assert not auth.has_device("1" * 64, first.user_id)
    assert made(store).user_id != first.user_id


def test_passwords(store):
    made(store)
    store.set_password_hash("alice", "other")
    assert store.get_user("alice").password_hash == "other"
    assert "other" not in repr(store.get_user("alice"))
    with pytest.raises(NotFound):
        store.set_password_hash("bob", "x")


def test_a_name_or_user_id_twice_is_a_conflict_and_nothing_is_made(store):
    store.create(row("alice"), password_hash="h", allocated=True, events=[])
    with pytest.raises(Conflict):
        store.create(row("alice", uid=1001), password_hash="h", allocated=True, events=[])
    with pytest.raises(Conflict):
        store.create(row("bob"), password_hash="h", allocated=True, events=[])
    assert [user.name for user in store.users()] == ["alice"]
    assert not store.is_taken(1001)


def test_kept_data_holds_its_user_id(store):
    first = store.create(row("alice"), password_hash="h", allocated=True, events=[])
    kept = KeptRow(agent="alice", uid=1000, app="demo", provider="fake", handle="h", time=4.0)
    store.remove(first, kept=kept, events=[])
    assert store.kept("alice") == dataclasses.replace(kept, source="local")
    assert store.is_taken(1000)
    assert store.last_uid() == 1000
    assert store.providers() == {"fake"}
    again = store.create(row("alice"), password_hash="h", allocated=True, events=[])
    assert store.kept("alice") is None
    store.remove(again, kept=None, events=[])
    assert not store.is_taken(1000)
    assert store.providers() == set()


@pytest.mark.parametrize("owner", ["local", "ldap"])
def test_kept_data_is_only_for_the_account_whose_it_was(store, owner):
    password_hash = "h" if owner == "local" else None
    first = store.create(row("alice"), password_hash=password_hash, allocated=True, events=[])
    assert store.bind_user("alice", "ldap", "1", ["staff"]) == (owner == "ldap")
    kept = KeptRow(agent="alice", uid=1000, app="demo", provider="fake", handle="h", time=4.0)
    store.remove(first, kept=kept, events=[])
    store.create(row("alice"), password_hash=None, allocated=True, events=[])
    assert not store.bind_user("alice", "ldap", "2", []), "another account of the name"
    assert not store.bind_user("alice", "pam", "1", []), "of another directory"
    assert store.bind_user("alice", "ldap", "1", []) == (owner == "ldap")
    store.release_user("alice")
    assert store.bind_user("alice", "ldap", "2", []), "an administrator has looked"


def test_the_time_since_a_departure_is_counted_in_steps(store):
    for name in ("alice", "bob"):
        store.create(row(name), password_hash=None, allocated=False, events=[])
    store.count_departed(1000.0, 10.0)
    store.set_departed("alice", 1000.0)
    for now, departed in ((1005.0, 1000.0), (2005.0, 1990.0), (5.0, -10.0), (9.0, -10.0)):
        store.count_departed(now, 10.0)
        assert [user.departed for user in store.users()] == [departed, None]


def test_kept_data_that_is_purged_frees_its_user_id(store):
    first = store.create(row("alice"), password_hash="h", allocated=True, events=[])
    store.remove(
        first, kept=KeptRow(agent="alice", uid=1000, app="demo", provider="f", handle="", time=4.0), events=[]
    )
    store.remove_kept("alice")
    assert store.kept("alice") is None
    assert not store.is_taken(1000)


def test_copies(store):
    first = made(store)
    moved = dataclasses.replace(first, version=2, provider="other")
    copy = CopyRow(id=0, agent="alice", provider="fake", directory="", handle="h", time=3.0)
    store.add_copy(copy, moved, [(first.id, event("moved"))])
    assert store.agents()[0].provider == "other"
    (found,) = store.copies("alice")
    assert dataclasses.replace(found, id=0) == copy
    store.set_copy_directory(found.id, "1-fake")
    assert store.copies("alice")[0].directory == "1-fake"
    assert store.providers() == {"fake", "other"}
    store.remove_copy(found.id)
    assert store.copies("alice") == []


def test_backends(store):
    known = BackendRow(name="fake", reachable=True, since=1.0, contact=2.0)
    store.save_backend(known)
    store.save_backend(dataclasses.replace(known, reachable=False))
    assert store.backends() == {"fake": dataclasses.replace(known, reachable=False)}


def test_events_come_newest_last_and_belong_to_one_agent(store, monkeypatch):
    first = made(store)
    store.save([], [(first.id, event("created", 1.0)), (first.id, event("ready", 2.0)), (99, event("other"))])
    assert [found.kind for found in store.events(first.id, 10)] == ["created", "ready"]
    assert [found.kind for found in store.events(first.id, 1)] == ["ready"]
    monkeypatch.setattr(module, "MAX_EVENTS", 2)
    store.trim_events()
    assert [found.kind for found in store.events(first.id, 10)] == ["ready"]


def test_another_agent_of_the_same_name_has_its_own_events(store):
    first = made(store)
    store.save([], [(first.id, event("ready"))])
    store.remove(first, kept=None, events=[])
    second = made(store)
    assert second.id != first.id
    assert store.events(second.id, 10) == []


def test_a_read_only_or_locked_database_raises_unavailable(store, tmp_path):
    first = made(store)
    other = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
    with store.database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=10")
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(Unavailable, match="cannot be used now"):
            store.save([dataclasses.replace(first, version=2)])
    finally:
        other.execute("ROLLBACK")
        other.close()
    store.save([dataclasses.replace(first, version=3, step="x")])
    assert store.agents()[0].step == "x"


def test_the_clock_of_a_boot_is_the_same_for_every_process(store):
    one = steady_clock(store.database)
    assert steady_clock(store.database).offset == one.offset
    store.database.set_meta("clock", "another-boot 5.0")
    assert steady_clock(store.database).offset != 5.0
    assert store.database.meta("clock", "").startswith(boot_id())


def test_a_name_belongs_to_the_account_that_signed_in_with_it_first(store):
    store.create(row(), password_hash=None, allocated=False, events=[])
    assert store.bind_user("alice", "ldap", None, ["staff"])
    assert store.bind_user("alice", "ldap", "1000", [])
    assert [user.name for user in store.users_of("ldap", "1000")] == ["alice"]
    assert store.users_of("oidc.uni", "1000") == store.users_of("ldap", "2000") == []
    assert not store.bind_user("alice", "ldap", "2000", ["staff"])
    assert not store.bind_user("alice", "oidc.uni", "1000", ["staff"])
    assert store.bind_user("alice", "ldap", None, ["b", "a"])
    user = store.get_user("alice")
    assert (user.source, user.subject, user.groups) == ("ldap", "1000", ("b", "a"))
    store.release_user("alice")
    assert store.bind_user("alice", "oidc.uni", "x", [])
    assert not store.bind_user("nobody", "ldap", None, [])
    with pytest.raises(NotFound):
        store.release_user("nobody")


def test_a_local_user_belongs_to_no_directory(store):
    made(store)
    assert not store.bind_user("alice", "ldap", None, [])
    assert store.get_user("alice").source is None
