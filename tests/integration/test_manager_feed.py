"""The feed over its real socket: snapshot, changes, lookups, wakes, activity; and what it does to the unruly."""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from contextlib import closing

import pytest

from dispatcher.plugin import names
from dispatcher.feed.protocol import encode
from dispatcher.manager.feed import server
from dispatcher.manager.feed import worker_connection as feed_worker
from dispatcher.manager.storage.auth import SessionRow
from dispatcher.manager.agents.lifecycle import FeedState, State
from dispatcher.manager.storage.rows import Desired
from dispatcher.manager.agents.agent import AgentView
from tests.support.installation import UnixConnection, until
from tests.support.manager_process import Worker, client_of, manager_in

ADDRESS = "192.0.2.1"


@pytest.fixture
def manager(short_tmp, monkeypatch):
    with manager_in(short_tmp, monkeypatch) as manager:
        with client_of(manager) as admin:
            admin.create_agent("alice", "correct horse")
            admin.create_agent("bob", "correct horse")
        yield manager


@pytest.fixture
def worker(manager):
    worker = Worker(manager.paths.feed_socket)
    yield worker
    worker.close()


@pytest.fixture
def proxy(manager):
    with client_of(manager, "proxy_socket") as client:
        yield client


def has(kind, key):
    return lambda message: message["type"] == "change" and key in str(message.get(kind, []))


def test_hello_then_a_snapshot_of_everything(manager, proxy):
    session = proxy.login("alice", "correct horse", ADDRESS)["session"]
    worker = Worker(manager.paths.feed_socket)
    hello, agents, sessions = worker.snapshot()
    assert (hello["type"], hello["version"], hello["installation"]) == ("hello", 1, "0a1b2c3d")
    assert hello["now"] == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=5)
    assert set(agents) == {"alice", "bob"}
    assert agents["alice"]["state"] == "running"
    assert agents["alice"]["endpoint"].startswith("unix:/")
    assert agents["alice"]["label"] == names.key("alice")
    assert agents["bob"] == agents["bob"] | {"state": "asleep", "endpoint": None, "user": "bob", "app": "demo"}
    row = sessions[session["sha256"]]
    assert (row["user"], row["agent"], row["agents"]) == ("alice", "alice", ["alice"])
    assert row["ttl"] == pytest.approx(86400, abs=5)
    worker.close()


def test_an_empty_snapshot_has_one_part(short_tmp, monkeypatch):
    with manager_in(short_tmp, monkeypatch) as manager:
        worker = Worker(manager.paths.feed_socket)
        assert worker.snapshot()[1:] == ({}, {})
        worker.close()


def test_a_sign_in_is_pushed_to_every_worker(manager, worker, proxy):
    other = Worker(manager.paths.feed_socket)
    worker.snapshot()
    other.snapshot()
    session = proxy.login("alice", "correct horse", ADDRESS)["session"]
    for one in (worker, other):
        message = one.until(has("sessions", session["sha256"]))
        assert message["sessions"][0]["agents"] == ["alice"]
    other.close()


def test_changes_of_an_agent_are_pushed_within_milliseconds(manager, worker):
    worker.snapshot()
    began = time.monotonic()
    manager.supervisor.put("bob", stage="resuming", feed_state="starting", fraction=0.5)
    row = worker.until(has("agents", "bob"))["agents"][0]
    assert (row["state"], row["stage"], row["fraction"]) == ("starting", "resuming", 0.5)
    assert time.monotonic() - began < 0.25


def test_many_changes_are_gathered(manager, worker):
    worker.snapshot()
    for number in range(2000):
        manager.supervisor.put("bob", detail=str(number))
    frames = 0
    while True:
        frames += 1
        if worker.until(has("agents", "bob"))["agents"][-1]["detail"] == "1999":
            break
    assert frames < 500


@pytest.mark.parametrize("how", ["logout", "revoked", "all revoked", "new password", "removed"])
def test_what_ends_a_session_is_pushed_at_once(manager, worker, proxy, how):
    sha256 = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    worker.snapshot()
    began = time.monotonic()
    with client_of(manager) as admin:
        if how == "logout":
            proxy.logout(sha256)
        elif how == "revoked":
            admin.revoke_session(sha256[:16])
        elif how == "all revoked":
            admin.revoke_sessions("alice")
        elif how == "new password":
            admin.set_password("alice", "another password")
        else:
            admin.delete_agent("alice")
    assert worker.until(has("sessions_gone", sha256))["sessions_gone"] == [sha256]
    assert time.monotonic() - began < 1


def test_expiry_is_pushed(short_tmp, monkeypatch):
    with manager_in(short_tmp, monkeypatch, auth={"session_idle": "400ms"}) as manager:
        with client_of(manager) as admin, client_of(manager, "proxy_socket") as proxy:
            admin.create_agent("alice", "correct horse")
            sha256 = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
            worker = Worker(manager.paths.feed_socket)
            worker.snapshot()
            began = time.monotonic()
            worker.until(has("sessions_gone", sha256))
            assert time.monotonic() - began < 2
            worker.close()


def test_agents_that_come_and_go_are_pushed_with_the_sessions_that_know_them(manager, worker, proxy):
    sha256 = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    worker.snapshot()
    with client_of(manager) as admin:
        admin.create_agent("alice", app="lab")
        worker.until(lambda m: any(row["agents"] == ["alice", "alice:lab"] for row in m.get("sessions", [])))
        proxy.select(sha256, "alice:lab")
        worker.until(lambda m: any(row["agent"] == "alice:lab" for row in m.get("sessions", [])))
        admin.delete_agent("alice:lab")
    gone = []

    def switched(message):
        gone.extend(message.get("agents_gone", []))
        return any((row["agent"], row["agents"]) == ("alice", ["alice"]) for row in message.get("sessions", []))

    worker.until(switched)
    assert gone == ["alice:lab"]
    assert proxy.lookup(sha256)["agent"] == "alice"


def test_a_user_who_vanishes_takes_the_sessions_along(manager, worker, proxy):
    sha256 = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    worker.snapshot()
    manager.supervisor.vanish("alice")
    worker.until(has("sessions_gone", sha256))


def test_lookups_are_answered(worker, proxy):
    sha256 = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    worker.snapshot()
    worker.send(type="lookup", sha256=sha256)
    found = worker.until(lambda m: m["type"] == "session" and m["sha256"] == sha256)
    assert found["session"]["user"] == "alice"
    assert [row["name"] for row in found["agents"]] == ["alice"]
    worker.send(type="lookup", sha256="0" * 64)
    missing = worker.until(lambda m: m["type"] == "session")
    assert missing == {"type": "session", "sha256": "0" * 64, "session": None, "agents": []}


def test_wakes_suspicions_activity_and_counters_arrive(manager, worker, proxy):
    sha256 = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    used = manager.sessions.require(sha256).last_used
    worker.snapshot()
    manager.supervisor.calls.clear()
    time.sleep(0.01)
    worker.send(type="wake", agent="bob")
    worker.send(type="dead", agent="alice")
    counts = {"use": 2, "stream": 10, "in": 7, "out": 9, "poll": 0, "idle_sockets": 1}
    worker.send(type="activity", agents={"alice": counts | {"new": 1}, "bob": "x"}, sessions=[sha256, "?", 7])
    worker.send(type="counters", values={"requests": 12, "Bad Name": 1, "x": "y", "negative": -1, "bool": True})
    until("all arrived", lambda: len(manager.supervisor.calls) >= 4 and manager.feed.counters().get("4242"))
    calls = manager.supervisor.calls
    assert ("wake", "bob") in calls
    assert ("check_endpoint", "alice") in calls
    assert ("record_activity", "alice", counts) in calls
    assert manager.feed.counters() == {"4242": {"requests": 12.0}}
    assert manager.sessions.require(sha256).last_used > used
    worker.until(lambda m: any(row["name"] == "bob" and row["state"] == "running" for row in m.get("agents", [])))
    with closing(UnixConnection(manager.paths.proxy_socket)) as connection:
        connection.request("GET", "/metrics")
        assert b'dispatcher_edge_requests_total{worker="4242"} 12.0' in connection.getresponse().read()


def test_unknown_and_malformed_messages_are_ignored(manager, worker):
    worker.snapshot()
    worker.send(type="new-in-version-2", x=1)
    for kind in ("wake", "dead", "lookup", "activity", "counters"):
        for value in (None, 7, [], {"a": 1}, "", "x" * 1000):
            worker.send(type=kind, agent=value, sha256=value, agents=value, sessions=value, values=value)
    worker.send(type="lookup", sha256="1" * 64)
    assert worker.until(lambda m: m["type"] == "session")["sha256"] == "1" * 64
    assert not [call for call in manager.supervisor.calls if call[0] in {"record_activity"}]


def test_what_a_report_breaks_is_contained(manager, worker, monkeypatch):
    worker.snapshot()
    monkeypatch.setattr(manager.supervisor, "check_endpoint", lambda _name: 1 / 0)
    worker.send(type="dead", agent="alice")
    worker.send(type="lookup", sha256="1" * 64)
    assert worker.until(lambda m: m["type"] == "session")


def test_another_version_is_told_and_let_go(manager):
    worker = Worker(manager.paths.feed_socket, version=2)
    assert worker.read()["type"] == "hello"
    assert "version 1" in worker.read()["what"]
    assert worker.read() is None
    worker.close()


@pytest.mark.parametrize(
    "data",
    [struct.pack(">I", 1 << 31), struct.pack(">I", 4) + b"nope", encode({"type": "wake", "agent": "bob"})],
    ids=["too long", "no JSON", "no hello"],
)
def test_nonsense_ends_the_connection_and_only_it(manager, worker, data):
    worker.snapshot()
    rude = Worker(manager.paths.feed_socket, hello=False)
    rude.sock.sendall(data)
    assert rude.read()["type"] == "hello"
    assert rude.read() is None
    rude.close()
    worker.send(type="lookup", sha256="1" * 64)
    assert worker.until(lambda m: m["type"] == "session")
    assert not [call for call in manager.supervisor.calls if call[0] == "wake"]


def test_who_says_nothing_is_let_go(manager, monkeypatch):
    monkeypatch.setattr(feed_worker, "HELLO_TIMEOUT", 0.2)
    silent = Worker(manager.paths.feed_socket, hello=False)
    assert silent.read()["type"] == "hello"
    assert silent.read() is None
    silent.close()
    until("nobody is left", lambda: manager.feed.connections() == 0)


def test_a_worker_that_does_not_read_is_dropped_and_holds_nobody_up(manager, worker, monkeypatch):
    monkeypatch.setattr(feed_worker, "MAX_BEHIND", 100_000)
    worker.snapshot()
    stuck = Worker(manager.paths.feed_socket)
    until("both are connected", lambda: manager.feed.connections() == 2)
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            manager.supervisor.put("bob", detail="x" * 1000)
            time.sleep(0.0005)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        end = time.monotonic() + 20
        while manager.feed.connections() == 2 and time.monotonic() < end:
            worker.until(has("agents", "bob"))
    finally:
        stop.set()
        thread.join()
    assert manager.feed.connections() == 1
    stuck.close()


def test_pings_come_while_nothing_happens(short_tmp, monkeypatch):
    monkeypatch.setattr(server.protocol, "PING_INTERVAL", 0.1)
    with manager_in(short_tmp, monkeypatch) as manager:
        worker = Worker(manager.paths.feed_socket)
        worker.snapshot()
        data = b""
        while data.count(b'"ping"') < 3:
            data += worker.sock.recv(65536)
        worker.close()


def test_a_hundred_thousand_sessions_and_ten_thousand_agents_load_quickly(manager):
    supervisor, now = manager.supervisor, manager.sessions._clock.now()
    for number in range(10_000):
        name = f"user{number}"
        supervisor.rows[name] = AgentView(
            name=name,
            user=name,
            user_id=number + 1000,
            app="demo",
            provider="fake",
            state=State.RUNNING,
            desired=Desired.RUNNING,
            feed_state=FeedState.RUNNING,
            label=names.key(name),
            since=now,
            created=now,
        )
    for number in range(100_000):
        user = f"user{number % 10_000}"
        manager.sessions._insert(
            SessionRow(
                sha256=f"{number:064x}",
                user=user,
                user_id=int(user[4:]) + 1000,
                agent=user,
                created=now,
                last_used=now,
            )
        )
    times = []
    for _ in range(3):
        worker = Worker(manager.paths.feed_socket, timeout=60)
        began = time.process_time()  # of both sides together: the machine may be busy with something else
        _, agents, sessions = worker.snapshot()
        times.append(time.process_time() - began)
        worker.close()
        assert (len(agents), len(sessions)) == (10_002, 100_000)
    # Measured on an idle machine: 0.7 s for both sides together; tracing for coverage costs much more.
    assert min(times) < (12.0 if sys.gettrace() else 4.0)


def test_a_session_that_ends_while_the_snapshot_is_sent_is_gone_in_the_end(manager):
    now, alices = manager.sessions._clock.now(), manager.supervisor.user_id("alice")
    for number in range(30_000):
        manager.sessions._insert(
            SessionRow(
                sha256=f"{number:064x}", user="alice", user_id=alices, agent="alice", created=now, last_used=now
            )
        )
    worker = Worker(manager.paths.feed_socket)
    worker.read()  # hello; the snapshot is on its way, stuck behind a full buffer
    manager.sessions.revoke(f"{7:064x}")
    worker.until(lambda m: m["type"] == "snapshot" and m["last"])
    worker.until(has("sessions_gone", f"{7:064x}"))
    worker.close()


@pytest.mark.root
def test_other_users_are_refused_even_if_the_mode_let_them(manager):
    import os

    manager.paths.feed_socket.chmod(0o666)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(54321)
        os.setuid(54321)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(str(manager.paths.feed_socket))
        data = b""
        while piece := sock.recv(4096):
            data += piece
        os.write(writer, data)
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    data = os.read(reader, 65536)
    os.close(reader)
    assert b"permission denied" in data
    assert b"snapshot" not in data


def revoked_in(proxy, sha256):
    """Revoke a session in a thread of its own; return the list that gets the seconds that took."""
    took = []

    def revoke():
        began = time.monotonic()
        proxy.logout(sha256)
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=revoke)
    thread.start()
    return thread, took


def test_a_sign_out_is_answered_when_every_worker_knows_of_it(manager, proxy):
    first, second = (Worker(manager.paths.feed_socket, sync=True) for _ in range(2))
    session = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    for worker in (first, second):
        worker.snapshot()
    thread, took = revoked_in(proxy, session)
    numbers = []
    for worker in (first, second):
        worker.until(has("sessions_gone", session))
        numbers.append(worker.until(lambda message: message["type"] == "sync")["number"])
    first.send(type="synced", number=numbers[0])
    second.send(type="synced", number=numbers[1] + 1)  # of something else
    second.send(type="synced", number="x")
    time.sleep(0.2)
    assert not took
    second.send(type="synced", number=numbers[1])
    thread.join(10)
    assert took and took[0] < 0.9
    for worker in (first, second):
        worker.close()


def test_a_worker_that_is_stuck_or_goes_holds_a_sign_out_up_for_a_moment_only(manager, proxy):
    stuck = Worker(manager.paths.feed_socket, sync=True)
    stuck.snapshot()
    session = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    thread, took = revoked_in(proxy, session)
    thread.join(10)
    assert 0.9 < took[0] < 3
    session = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    thread, took = revoked_in(proxy, session)
    thread.join(10)
    assert took[0] < 0.9, "nobody waits twice for who hangs"
    number = stuck.until(lambda message: message["type"] == "sync")["number"]
    stuck.send(type="synced", number=number)
    session = proxy.login("alice", "correct horse", ADDRESS)["session"]["sha256"]
    thread, took = revoked_in(proxy, session)
    stuck.until(has("sessions_gone", session))
    stuck.close()
    thread.join(10)
    assert took[0] < 0.9


def test_sessions_that_end_before_the_feed_is_served_wait_for_nobody(short_tmp):
    feed = server.Feed(None, supervisor=None, sessions=None, tokens=None, allowed=None)
    assert feed.synchronize() is False
    feed._pool.shutdown()


def test_only_tokens_that_open_an_app_are_pushed_and_their_end_and_use_too(manager, worker):
    worker.snapshot()
    with client_of(manager) as admin:
        for owner in ({"user": "alice"}, {"service": "alice"}):
            admin.create_token(scopes=["admin"], **owner)
        made = admin.create_token(user="alice", scopes=["read", "app"], expires="never")
        change = worker.until(lambda message: message.get("tokens"))
        (row,) = change["tokens"]
        assert row["sha256"].startswith(made["id"]) and made["token"] not in str(change)
        assert (row["user"], row["agent"], row["agents"], row["ttl"]) == ("alice", "alice", ["alice"], None)
        admin.create_agent("alice:web", app="demo")
        change = worker.until(lambda message: message.get("tokens"))
        assert [(each["agent"], sorted(each["agents"])) for each in change["tokens"]] == [
            ("alice", ["alice", "alice:web"])
        ]
        late = Worker(manager.paths.feed_socket)
        assert late.read()["type"] == "hello"
        assert [each["sha256"] for each in late.read()["tokens"]] == [row["sha256"]]
        late.close()
        worker.send(type="activity", agents={}, sessions=[], tokens=[row["sha256"], 7, "x"])
        until("its use is noted", lambda: any(each["last_used"] for each in admin.tokens()["tokens"]))
        admin.revoke_token(made["id"])
        change = worker.until(lambda message: message.get("tokens_gone"))
        assert change["tokens_gone"] == [row["sha256"]]


def test_a_removed_users_tokens_are_gone_before_the_agent_is(manager, worker):
    worker.snapshot()
    with client_of(manager) as admin:
        admin.create_token(user="bob", scopes=["app"])
        worker.until(lambda message: message.get("tokens"))
        admin.delete_agent("bob", wait=10)
        gone = worker.until(lambda message: message.get("tokens_gone"))
        assert gone.get("agents_gone", []) == []
        worker.until(lambda message: message.get("agents_gone"))


def test_a_token_leads_to_an_app_that_its_user_may_use(manager, worker):
    worker.snapshot()
    supervisor = manager.supervisor
    with client_of(manager) as admin:
        admin.create_agent("alice:lab", app="lab")
        admin.create_token(user="alice", scopes=["app"])

    def leads_to(agent):
        return lambda message: [row["agent"] for row in message.get("tokens", ())] == [agent]

    worker.until(leads_to("alice"))
    supervisor.forbidden.add("demo")
    supervisor.access.on_change("alice")
    worker.until(leads_to("alice:lab"))
    supervisor.forbidden.clear()
    manager.tokens.republish()
    worker.until(leads_to("alice"))
