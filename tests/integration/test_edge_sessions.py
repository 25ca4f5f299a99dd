"""Sessions, agents' states and the feed: holding, waking, refusing, ending what is open."""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest

from tests.support.edge_feed import agent_row, session_row
from tests.support.edge_harness import (
    BOB,
    COOKIE,
    TOKEN,
    Agent,
    Connection,
    Edge,
    Reader,
    descriptors,
    echo,
    eventually,
    read_all,
)

HOST = b"Host: app.test\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + COOKIE
HTML = b"Accept: text/html"
UPGRADE = (
    b"GET /ws HTTP/1.1\r\n" + HOST + COOKIE + b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def bob(name: str) -> bytes:
    return b"Cookie: dispatcher=" + name.encode() + b"\r\n"


def waiting_portal(connection: Connection) -> None:
    """Answer like the portal: the waiting page with what the edge said of the request."""
    while head := connection.head():
        connection.body(head)
        connection.send(
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nCache-Control: no-store\r\n"
            b"Content-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(head) + head
        )


def test_a_sleeping_agent_is_woken_and_the_request_held():
    with Edge(agent_state="asleep", hold=5) as edge:
        edge.feed.on_wake = lambda name: edge.feed.add(agents=(agent_row(name, edge.agent.endpoint),))
        start = time.monotonic()
        assert edge.get("/", HTML).status == 200
        assert time.monotonic() - start < 2
        assert edge.feed.of_type("wake") == [{"type": "wake", "agent": "alice"}]


def test_an_agent_that_falls_asleep_right_after_it_woke_is_woken_again_at_once():
    with Edge(agent_state="asleep", hold=5) as edge:
        edge.feed.on_wake = lambda name: edge.feed.add(agents=(agent_row(name, edge.agent.endpoint),))
        start = time.monotonic()
        for count in (1, 2, 3):
            assert edge.get(f"/{count}", HTML).status == 200
            assert len(edge.feed.of_type("wake")) == count
            edge.feed.add(agents=(agent_row("alice", None, "asleep"),))
            eventually(lambda: edge.worker.context.tables.agents["alice"].state == "asleep")
        assert time.monotonic() - start < 2


def test_a_held_body_reaches_the_agent_whole():
    with Edge(agent_state="asleep", hold=5) as edge:
        edge.feed.on_wake = lambda name: (
            time.sleep(0.2),
            edge.feed.add(agents=(agent_row(name, edge.agent.endpoint),)),
        )
        body = os.urandom(2_000_000)
        with edge.connect() as sock:
            threading.Thread(
                target=sock.sendall,
                args=(b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: %d\r\n\r\n" % len(body) + body,),
                daemon=True,
            ).start()
            assert Reader(sock).answer().body.endswith(body)


def test_a_starting_agent_gets_the_waiting_page_after_the_hold():
    with Edge(agent_state="starting", hold=0.5, portal=waiting_portal) as edge:
        answer = edge.get("/lab?x=1", HTML, b"X-Dispatcher-Agent: bob", b"Accept-Language: de")
        assert answer.status == 503 and answer.field(b"retry-after") == b"2"
        assert answer.body.startswith(b"GET /auth/waiting HTTP/1.1\r\n")
        assert b"\r\nX-Dispatcher-Agent: alice\r\nX-Dispatcher-Target: /lab?x=1\r\n" in answer.body
        assert b"Agent: bob" not in answer.body
        assert b"\r\nAccept: text/html\r\n" in answer.body and b"-Language" not in answer.body
        assert COOKIE.strip() in answer.body
        assert edge.worker.context.tables.agents["alice"].in_flight == 0
        assert not edge.feed.of_type("wake")


def test_a_program_gets_a_problem_document():
    with Edge(agent_state="starting", hold=0.3) as edge:
        edge.feed.add(agents=(agent_row("alice", None, "starting", stage="pulling image", fraction=0.5),))
        answer = edge.get("/api", b"Accept: application/json")
        document = json.loads(answer.body)
        assert (
            answer.status == 503 and answer.field(b"cache-control") == b"no-store" and answer.field(b"retry-after")
        )
        assert document["agent"]["stage"] == "pulling image" and document["status"] == 503


def test_a_failed_agent_is_neither_held_nor_woken():
    with Edge(agent_state="failed", hold=5, portal=waiting_portal) as edge:
        start = time.monotonic()
        assert edge.get("/", HTML).status == 503
        assert edge.get("/").status == 503
        assert time.monotonic() - start < 2 and not edge.feed.of_type("wake")


def test_routing_is_by_state_and_not_by_a_connection_that_works():
    """A paused agent still accepts connections."""
    with Edge(agent_state="asleep", hold=0.2, portal=waiting_portal) as edge:
        assert edge.get("/", HTML).status == 503
        assert not edge.agent.heads


def test_requests_held_for_one_agent_are_bounded():
    with Edge(agent_state="starting", hold=4) as edge:
        socks = [edge.connect() for _ in range(80)]
        for sock in socks:
            sock.sendall(b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 0\r\n\r\n")
        eventually(lambda: len(edge.worker.context.tables.agents["alice"].waiting) == 64)
        refused = eventually(lambda: [s for s in socks[64:] if s.recv(20, socket.MSG_PEEK | socket.MSG_DONTWAIT)])
        assert len(refused) == 16
        edge.feed.add(agents=(agent_row("alice", edge.agent.endpoint),))
        assert [Reader(sock).answer().status for sock in socks[:64]] == [200] * 64
        for sock in socks:
            sock.close()


def test_old_tabs_do_not_wake_an_agent():
    with Edge(agent_state="asleep", hold=0.2) as edge:
        poll = [b"Sec-Fetch-Mode: cors", b"Sec-Fetch-Dest: empty"]
        for _ in range(2):
            edge.get("/api/status?1700000000001", *poll)
        eventually(lambda: edge.feed.of_type("wake"))
        before = len(edge.feed.of_type("wake"))
        start = time.monotonic()
        with edge.connect() as sock:
            reader = Reader(sock)
            for number in range(60):
                sock.sendall(
                    b"GET /api/status?17000000%05d HTTP/1.1\r\n" % number
                    + HOST
                    + COOKIE
                    + b"Sec-Fetch-Mode: cors\r\n\r\n"
                )
                assert reader.answer().status == 503
                time.sleep(0.02)
        assert time.monotonic() - start < 5, "polls are refused at once, not held"
        assert len(edge.feed.of_type("wake")) == before
        edge.get("/", HTML)
        assert len(edge.feed.of_type("wake")) > before, "a person is heard at once"


def test_a_silent_tab_that_reconnects_its_websocket_does_not_wake():
    with Edge(agent_state="asleep", hold=0.1) as edge:
        for _ in range(8):
            assert edge.ask(UPGRADE, timeout=3).startswith(b"HTTP/1.1 503")
            time.sleep(0.05)
        time.sleep(1.1)
        before = len(edge.feed.of_type("wake"))
        assert edge.ask(UPGRADE, timeout=3).startswith(b"HTTP/1.1 503")
        assert len(edge.feed.of_type("wake")) == before


def test_nobody_listens():
    with Edge(hold=0.4, portal=waiting_portal) as edge:
        edge.feed.add(agents=(agent_row("alice", "tcp:127.0.0.1:9"),))
        assert edge.get("/", HTML).status == 502
        assert edge.feed.of_type("dead") == [{"type": "dead", "agent": "alice"}]


def test_a_killed_agent_comes_back_while_the_request_waits():
    with Edge(hold=5) as edge:
        edge.feed.add(agents=(agent_row("alice", "tcp:127.0.0.1:9"),))

        def revive() -> None:
            edge.feed.wait_for(lambda frame: frame["type"] == "dead")
            edge.feed.add(agents=(agent_row("alice", None, "starting"),))
            time.sleep(0.2)
            edge.feed.add(agents=(agent_row("alice", edge.agent.endpoint),))

        threading.Thread(target=revive, daemon=True).start()
        assert edge.get("/", HTML).status == 200


def test_ten_thousand_upgrades_to_a_dead_agent_leave_descriptors_flat():
    with Edge(hold=0) as edge:
        edge.feed.add(agents=(agent_row("alice", "tcp:127.0.0.1:9"),))
        edge.ask(UPGRADE, timeout=3)
        before = descriptors()
        for _ in range(1500):
            assert b" 502 " in edge.ask(UPGRADE, timeout=3)
        assert descriptors() <= before + 5


def test_unix_endpoints_are_opened_only_where_they_are_the_agents():
    with Edge(hold=0) as edge:
        path = str(edge.dir / "agent.sock")
        own = Agent(echo, path)
        edge.feed.add(agents=(agent_row("alice", f"unix:{path}", uid=os.getuid()),))
        assert edge.get().status == 200
        edge.feed.add(agents=(agent_row("alice", f"unix:{path}", uid=os.getuid() + 1),))
        assert edge.get().status == 502
        link = str(edge.dir / "link.sock")
        os.symlink(edge.dir / "portal.sock", link)
        edge.portal.heads.clear()
        edge.feed.add(agents=(agent_row("alice", f"unix:{link}", uid=os.getuid()),))
        assert edge.get().status == 502
        assert not edge.portal.heads
        own.close()


def test_a_session_younger_than_the_feed_is_looked_up_once():
    with Edge() as edge:
        row = session_row(BOB, "alice")
        edge.feed.secret_sessions[row["sha256"]] = row
        socks = [edge.connect() for _ in range(10)]
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + bob(BOB) + b"\r\n")
        assert [Reader(sock).answer().status for sock in socks] == [200] * 10
        assert len(edge.feed.of_type("lookup")) == 1
        for sock in socks:
            sock.close()


def test_an_unknown_session_is_asked_for_once_in_a_while():
    with Edge() as edge:
        for _ in range(5):
            assert edge.get("/", cookie=bob(BOB)).status == 401
        assert len(edge.feed.of_type("lookup")) == 1
        edge.feed.add(sessions=(session_row(BOB, "alice"),))
        eventually(lambda: edge.get("/", cookie=bob(BOB)).status == 200)


def test_a_lookup_that_is_not_answered_ends():
    with Edge() as edge:
        edge.feed.answer_lookups = False
        start = time.monotonic()
        assert edge.get("/", cookie=bob(BOB)).status == 401
        assert 1.5 < time.monotonic() - start < 4


def test_a_client_that_leaves_during_a_lookup_or_a_hold_leaves_nothing():
    with Edge(agent_state="starting", hold=3) as edge:
        edge.feed.answer_lookups = False
        with edge.connect() as one, edge.connect() as two:
            one.sendall(b"GET / HTTP/1.1\r\n" + HOST + bob(BOB) + b"\r\n")
            two.sendall(GET + b"\r\n")
            eventually(lambda: edge.worker.context.tables.agents["alice"].waiting)
        eventually(lambda: not edge.worker.context.tables.agents["alice"].waiting)
        eventually(lambda: edge.worker.clients.open == 0)


def test_bob_does_not_reach_alice():
    with Edge() as edge:
        other = Agent(echo)
        edge.feed.add(agents=(agent_row("bob", other.endpoint),), sessions=(session_row(BOB, "bob"),))
        eventually(lambda: edge.get("/", cookie=bob(BOB)).status == 200)
        assert other.heads and not edge.agent.heads
        for query in ("?agent=alice", "?agent=nobody"):
            assert edge.get("/auth/events" + query, cookie=bob(BOB)).status == 404
        # A row that names somebody else's agent opens nothing.
        row = session_row(BOB, "alice", user="bob")
        edge.feed.add(sessions=(row,))
        eventually(lambda: edge.get("/", cookie=bob(BOB)).status == 404)
        assert not edge.agent.heads
        other.close()


# The end of a session.


def stream(connection: Connection) -> None:
    """Upgrade, an endless event stream, or an endless download."""
    head = connection.head()
    if b"/ws" in head:
        connection.send(SWITCH)
        while connection.sock.recv(1000):
            pass
    elif b"/sse" in head:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        connection.sock.recv(1)
    else:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")
        while True:
            connection.send(b"x" * 100000)
            time.sleep(0.01)


@pytest.mark.parametrize("how", ["revoked", "expired", "agent removed", "logged out by a snapshot"])
def test_everything_open_ends_with_the_session(how):
    with Edge(stream) as edge:
        if how == "expired":
            edge.feed.add(sessions=(session_row(TOKEN, "alice", ttl=1.0),))
            edge.feed.sessions.clear()
        websocket, sse, download = (edge.connect() for _ in range(3))
        websocket.sendall(UPGRADE)
        assert websocket.recv(1000).startswith(b"HTTP/1.1 101")
        sse.sendall(b"GET /sse HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
        assert b" 200 " in sse.recv(1000)
        download.sendall(b"GET /big HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
        assert b" 200 " in download.recv(100)
        start = time.monotonic()
        if how == "revoked":
            edge.feed.remove(tokens=(TOKEN,))
        elif how == "agent removed":
            edge.feed.remove(agents=("alice",), tokens=(TOKEN,))
        elif how == "logged out by a snapshot":
            edge.feed.stop()
            edge.feed.sessions.clear()
            edge.feed.start()
        assert read_all(websocket).endswith(b"\x88\x02\x03\xf0")
        read_all(sse)
        read_all(download)
        assert time.monotonic() - start < 3.5
        assert edge.get().status == 401
        for sock in (websocket, sse, download):
            sock.close()
        eventually(lambda: edge.worker.clients.open == 0)


def test_a_dead_session_does_not_reopen():
    with Edge() as edge, edge.connect() as sock:
        reader = Reader(sock)
        sock.sendall(GET + b"\r\n")
        assert reader.answer().status == 200
        edge.feed.remove(tokens=(TOKEN,))
        eventually(lambda: not edge.worker.context.tables.sessions)
        sock.sendall(GET + b"\r\n")
        assert reader.answer().status == 401
        assert edge.ask(UPGRADE, timeout=3).startswith(b"HTTP/1.1 401")
        assert len(edge.agent.heads) == 1


# The feed.


def test_what_is_known_is_served_while_the_feed_is_away():
    with Edge(feed_grace=3) as edge:
        assert edge.get().status == 200
        edge.feed.stop()
        eventually(lambda: not edge.worker.feed.complete)
        assert edge.get().status == 200
        assert edge.get("/", cookie=bob(BOB)).status == 401
        eventually(
            lambda: not edge.worker.context.tables.agents, 20
        )  # this ends requests in progress, so none is sent
        assert edge.get().status == 503
        edge.feed.start()
        eventually(lambda: edge.get().status == 200, 6)


def test_expiry_is_applied_without_the_manager():
    with Edge() as edge:
        edge.feed.add(sessions=(session_row(BOB, "alice", ttl=3.0),))
        eventually(lambda: edge.get("/", cookie=bob(BOB)).status == 200)
        edge.feed.stop()
        # No request is sent until then: the one in progress at that moment would be cut off.
        time.sleep(3.3)
        assert edge.get("/", cookie=bob(BOB)).status == 401
        assert edge.get().status == 200


def test_a_feed_of_another_version_is_no_feed():
    from dispatcher.feed import protocol

    before = protocol.VERSION
    with Edge() as edge:
        edge.feed.stop()
        try:
            protocol.VERSION = 2
            edge.feed.start()
            time.sleep(0.3)
        finally:
            protocol.VERSION = before
        assert edge.get().status == 200, "what was known is still served"


def test_activity_is_reported():
    with Edge() as edge:
        edge.get("/", HTML)
        for _ in range(6):
            edge.get("/api/x", b"Sec-Fetch-Mode: cors")
        frame = edge.feed.wait_for(lambda frame: frame["type"] == "activity")
        report = frame["agents"]["alice"]
        assert report["use"] == 3 and report["poll"] == 4 and report["in"] > 500 and report["out"] > 500
        assert frame["sessions"] == [session_row(TOKEN, "alice")["sha256"]]
        counters = edge.feed.wait_for(lambda frame: frame["type"] == "counters")["values"]
        assert counters['requests_total{app="demo",class="2xx"}'] == 7


# The event stream.


def test_events_tell_the_owner_what_happens():
    with Edge(agent_state="asleep") as edge, edge.connect() as sock:
        sock.sendall(b"GET /auth/events HTTP/1.1\r\n" + HOST + COOKIE + b"Accept: text/event-stream\r\n\r\n")
        received = sock.recv(4000)
        while b"\n\n" not in received.partition(b"\r\n\r\n")[2]:
            received += sock.recv(4000)
        assert b"Content-Type: text/event-stream" in received and b"no-store" in received
        edge.feed.add(
            agents=(agent_row("alice", None, "starting", stage="start", detail="pulling", fraction=0.25),)
        )
        event = json.loads(sock.recv(4000).removeprefix(b"data: "))
        assert event == {
            "agent": "alice", "state": "starting", "stage": "start", "detail": "pulling", "fraction": 0.25, "failed": False,
        }  # fmt: skip
        edge.feed.remove(agents=("alice",))
        assert b'"gone"' in read_all(sock)
    with Edge() as edge:
        assert edge.get("/auth/events", cookie=b"").status == 401
        assert edge.get("/auth/events", method="POST").status == 405
        edge.agent.heads.clear()
        socks = []
        for _ in range(20):
            sock = edge.connect()
            sock.sendall(b"GET /auth/events HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
            socks.append(sock)
        answers = [sock.recv(20) for sock in socks]
        assert sum(b" 200 " in answer for answer in answers) == 16
        edge.feed.remove(tokens=(TOKEN,))
        for sock, answer in zip(socks, answers, strict=True):
            if b" 200 " in answer:
                read_all(sock)
            sock.close()
