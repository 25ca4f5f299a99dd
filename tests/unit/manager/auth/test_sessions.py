"""Sessions begin, are used, and end: by time, by revocation, with their parent, with their user."""

from __future__ import annotations

import threading

import pytest

from dispatcher.plugin.errors import Forbidden, NotFound, Unavailable
from dispatcher.manager.storage.auth import AuthStore, Visitor
from dispatcher.manager.storage.database import Database
from dispatcher.manager.auth.sessions import MAX_PER_USER, Lifetimes, Sessions, digest
from tests.support.manager_parts import Clock

HERE = Visitor(address="192.0.2.1", user_agent="Browser")
LIFETIMES = Lifetimes(lifetime=1000.0, idle=100.0)


class World:
    def __init__(self, directory):
        self.clock = Clock(1000.0)
        self.database = Database(f"sqlite:///{directory}/x.db")
        self.database.open()
        self.store = AuthStore(self.database)
        self.changed, self.gone = [], []
        self.users = {"alice": 1, "bob": 2}
        self.sessions = self.restarted()

    def restarted(self, lifetimes=LIFETIMES):
        sessions = Sessions(self.store, self.clock, lifetimes, self.users.get)
        sessions.load()
        sessions.subscribe(lambda changed, gone: (self.changed.extend(changed), self.gone.extend(gone)))
        return sessions

    def begin(self, user="alice", agent=None):
        return self.sessions.create(user, agent or user, HERE, standing=self.sessions.standing(user))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.database.close()


def test_only_the_hash_of_a_token_is_kept(world, tmp_path):
    token, row = world.begin()
    assert len(token) >= 43
    assert row.sha256 == digest(token)
    world.database.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert row.sha256.encode() in stored
    assert token.encode() not in stored
    assert world.changed == [row.sha256]


def test_tokens_are_new_each_time(world):
    assert len({world.begin()[0] for _ in range(20)}) == 20


def test_a_session_survives_a_restart(world):
    _, row = world.begin()
    again = world.restarted()
    assert again.require(row.sha256).user == "alice"
    assert again.visitors([row])[row.sha256] == HERE


def test_sessions_of_users_who_are_gone_or_made_anew_do_not_survive_a_restart(world):
    _, alices = world.begin("alice")
    _, bobs = world.begin("bob")
    world.users.clear()
    world.users["alice"] = 3  # made anew; bob is gone
    sessions = world.restarted()
    assert sessions.get(alices.sha256) is None
    assert sessions.get(bobs.sha256) is None
    assert world.store.sessions() == []


def test_no_session_and_no_browser_of_a_removed_user_is_the_next_ones_of_that_name(world):
    """Even when nothing told of the removal, or what it did could not be written."""
    standing = world.sessions.standing("alice")
    _, old = world.sessions.create("alice", "alice", HERE, standing=standing, device="d" * 64)
    _, bobs = world.begin("bob")
    world.users["alice"] = 3
    assert world.sessions.get(old.sha256) is None
    assert world.sessions.all("alice") == [] and world.sessions.all() == [bobs]
    for make in (
        lambda: world.sessions.child(old, "h", "alice"),
        lambda: world.sessions.create("alice", "alice", HERE, standing=standing),
    ):
        with pytest.raises(Forbidden):
            make()
    assert not world.store.has_device("d" * 64, 3)
    assert not world.store.knows_device("d" * 64, 3, world.clock.now())
    _, new = world.begin("alice")
    assert world.sessions.all("alice") == [new]
    world.gone.clear()
    world.sessions.end_expired()
    assert world.gone == [old.sha256], "the edge closes what it has open"
    assert {row.sha256 for row in world.store.sessions()} == {new.sha256, bobs.sha256}


def test_it_ends_without_use(world):
    _, row = world.begin()
    world.clock.time += 99.9
    assert world.sessions.ttl(row) == pytest.approx(0.1)
    assert world.sessions.get(row.sha256)
    world.clock.time += 0.2
    assert world.sessions.get(row.sha256) is None
    world.sessions.end_expired()
    assert world.gone == [row.sha256]
    assert world.store.sessions() == []


def test_use_keeps_it_until_its_lifetime_is_over(world):
    _, row = world.begin()
    for _ in range(19):
        world.clock.time += 50
        world.sessions.touch([row.sha256])
        assert world.sessions.get(row.sha256)
    assert world.sessions.ttl(row) == pytest.approx(50)
    world.clock.time += 51
    assert world.sessions.get(row.sha256) is None


def test_use_is_passed_on_now_and_then_and_written_down_in_batches(world):
    _, row = world.begin()
    world.changed.clear()
    for _ in range(100):
        world.clock.time += 0.1
        world.sessions.touch([row.sha256, "unknown"])
    assert 1 <= len(world.changed) <= 3
    assert world.store.sessions()[0].last_used == 1000.0
    world.sessions.flush()
    assert world.store.sessions()[0].last_used == pytest.approx(1010.0)
    assert world.restarted().require(row.sha256).last_used == pytest.approx(1010.0)


def test_a_dead_session_is_not_revived_by_use(world):
    _, row = world.begin()
    world.clock.time += 101
    world.sessions.touch([row.sha256])
    assert world.sessions.get(row.sha256) is None


def test_children_end_with_their_parent_and_their_use_is_its_use(world):
    _, parent = world.begin()
    token, child = world.sessions.child(parent, "alice-abc.example.org", "alice")
    assert child.sha256 == digest(token)
    world.clock.time += 60
    world.sessions.touch([child.sha256])
    world.clock.time += 60
    assert world.sessions.get(parent.sha256)
    world.sessions.flush()
    again = world.restarted()
    assert again.require(child.sha256).host == "alice-abc.example.org"
    again.revoke(parent.sha256)
    assert again.get(child.sha256) is None
    assert set(world.gone) == {parent.sha256, child.sha256}
    assert world.store.sessions() == []


def test_a_dead_parent_has_no_children(world):
    _, parent = world.begin()
    world.sessions.revoke(parent.sha256)
    with pytest.raises(Forbidden):
        world.sessions.child(parent, "h", "alice")
    assert world.sessions.all() == []
    assert world.store.sessions() == []


def test_all_of_a_user_end_but_one(world):
    rows = [world.begin()[1] for _ in range(3)]
    _, bobs = world.begin("bob")
    assert world.sessions.revoke_user("alice", spare=rows[1].sha256) == 2
    assert [row.sha256 for row in world.sessions.all("alice")] == [rows[1].sha256]
    assert world.sessions.get(bobs.sha256)


def test_a_sign_in_that_overlaps_the_end_of_all_sessions_comes_to_nothing(world):
    standing = world.sessions.standing("alice")
    world.sessions.revoke_user("alice")
    with pytest.raises(Forbidden):
        world.sessions.create("alice", "alice", HERE, standing=standing)
    assert world.sessions.all("alice") == []
    assert world.store.sessions() == []


def test_renewal_replaces_one_and_ends_the_others(world):
    _, one = world.begin()
    _, other = world.begin()
    token, new = world.sessions.renew(one.sha256)
    assert [row.sha256 for row in world.sessions.all("alice")] == [new.sha256] == [digest(token)]
    assert set(world.gone) == {one.sha256, other.sha256}
    with pytest.raises(NotFound):
        world.sessions.renew(one.sha256)


def test_one_user_has_so_many_at_most_and_the_least_used_goes(world):
    first = world.begin()[1]
    for _ in range(MAX_PER_USER):
        world.clock.time += 0.01
        world.begin()
    assert len(world.sessions.all("alice")) == MAX_PER_USER
    assert world.gone == [first.sha256]


def test_an_agent_that_is_gone_is_replaced_and_its_host_sessions_end(world):
    _, row = world.begin(agent="alice:lab")
    _, child = world.sessions.child(row, "lab.example.org", "alice:lab")
    world.sessions.replace_agent("alice", "alice:lab", "alice")
    assert world.sessions.require(row.sha256).agent == "alice"
    assert world.sessions.get(child.sha256) is None
    assert world.restarted().require(row.sha256).agent == "alice"


def test_public_ids_are_of_the_own_user_only(world):
    _, row = world.begin()
    assert world.sessions.by_id(row.sha256[:16]).sha256 == row.sha256
    with pytest.raises(NotFound):
        world.sessions.by_id(row.sha256[:16], "bob")
    with pytest.raises(NotFound):
        world.sessions.by_id("0" * 16)


def test_shorter_lifetimes_count_for_sessions_that_exist(world):
    _, row = world.begin()
    world.clock.time += 50
    world.sessions.set_lifetimes(Lifetimes(lifetime=1000.0, idle=10.0))
    assert world.sessions.get(row.sha256) is None
    world.sessions.end_expired()
    assert row.sha256 in world.gone


@pytest.fixture
def full_disk(world, monkeypatch):
    def full():
        raise Unavailable("The database cannot be used now", why="disk full")

    def freed():
        monkeypatch.setattr(world.database, "write", write)

    write = world.database.write
    monkeypatch.setattr(world.database, "write", full)
    return freed


def test_ending_counts_at_once_even_while_the_disk_is_full(world, request):
    _, row = world.begin()
    freed = request.getfixturevalue("full_disk")
    world.sessions.revoke(row.sha256)
    assert world.sessions.get(row.sha256) is None
    assert world.gone == [row.sha256]
    freed()
    world.sessions.flush()
    assert world.store.sessions() == []


def test_a_removal_ends_and_moves_sessions_even_while_the_disk_is_full(world, request):
    _, row = world.begin(agent="alice:lab")
    _, child = world.sessions.child(row, "lab.example.org", "alice:lab")
    _, bobs = world.begin("bob")
    freed = request.getfixturevalue("full_disk")
    world.sessions.replace_agent("alice", "alice:lab", "alice")
    assert world.sessions.require(row.sha256).agent == "alice"
    world.sessions.revoke_user("bob")
    assert set(world.gone) == {child.sha256, bobs.sha256}
    freed()
    world.sessions.flush()
    assert [(kept.sha256, kept.agent) for kept in world.store.sessions()] == [(row.sha256, "alice")]


def test_the_thread_ends_sessions_by_itself(tmp_path):
    world = World(tmp_path)
    ended = threading.Event()
    sessions = world.restarted(lifetimes=Lifetimes(lifetime=1000.0, idle=0.4))
    sessions.subscribe(lambda _changed, gone: gone and ended.set())
    sessions.start()
    sessions.create("alice", "alice", HERE, standing=sessions.standing("alice"))
    world.clock.time += 0.5
    assert ended.wait(2)
    sessions.close()
    world.database.close()


def test_known_browsers_are_of_one_user_bounded_and_forgotten(world):
    now = world.clock.now()
    for number in range(25):
        world.clock.time += 1
        standing = world.sessions.standing("alice")
        world.sessions.create("alice", "alice", HERE, standing=standing, device=f"{number:064}")
    assert not world.store.knows_device(f"{0:064}", 1, now)
    assert world.store.knows_device(f"{24:064}", 1, now)
    assert not world.store.knows_device(f"{24:064}", 2, now)
    assert not world.store.knows_device(f"{24:064}", 1, now + 200 * 86400)


def test_a_jump_of_the_wall_clock_ends_nothing(tmp_path, monkeypatch):
    import time

    from dispatcher.manager.storage.agents import steady_clock

    database = Database(f"sqlite:///{tmp_path}/x.db")
    database.open()
    store, real = AuthStore(database), time.time
    users = {"alice": 1}
    sessions = Sessions(store, steady_clock(database), LIFETIMES, users.get)
    _, row = sessions.create("alice", "alice", HERE, standing=sessions.standing("alice"))
    for jump in (36_000.0, -36_000.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        sessions.end_expired()
        assert sessions.ttl(row) == pytest.approx(100, abs=5)
        again = Sessions(
            store, steady_clock(database), LIFETIMES, users.get
        )  # a restarted manager, the clock still wrong
        again.load()
        assert again.ttl(again.require(row.sha256)) == pytest.approx(100, abs=5)
    database.close()


def test_a_hundred_thousand_sessions_stay_quick(world):
    import time

    from dispatcher.manager.storage.auth import SessionRow

    table = world.sessions
    for number in range(100_000):
        key = f"{number:064x}"
        table._insert(
            SessionRow(
                sha256=key, user=f"u{number % 10000}", user_id=1, agent="a", created=1000.0, last_used=1000.0
            )
        )
    world.users.update((f"u{number}", 1) for number in range(10000))
    began = time.thread_time()
    for number in range(1000):
        world.sessions.get(f"{number:064x}")
        world.sessions.touch([f"{number:064x}"])
    world.sessions.all("u7")
    assert time.thread_time() - began < 0.5


def test_use_that_could_not_be_written_is_written_later(world, monkeypatch):
    _, row = world.begin()
    world.clock.time += 10
    world.sessions.touch([row.sha256])

    def fail(*_):
        raise Unavailable("no")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "set_last_used", fail)
        with pytest.raises(Unavailable):
            world.sessions.flush()
    world.sessions.flush()
    assert world.store.sessions()[0].last_used == world.clock.time


def test_a_change_that_never_works_is_not_in_the_way_of_a_revocation(world, monkeypatch):
    def fail(*_):
        raise ValueError("no")

    _, first = world.begin()
    _, second = world.begin("bob")
    with monkeypatch.context() as patch:
        patch.setattr(world.store, "remove_sessions", fail)
        world.sessions.revoke(first.sha256)
    world.sessions.revoke(second.sha256)
    assert [row.sha256 for row in world.store.sessions()] == [first.sha256]
