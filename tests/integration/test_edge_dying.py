"""Agents and clients that end under a request: tried again, waited for, or told honestly; never a hang."""

from __future__ import annotations

import re
import socket
import threading
import time
from types import SimpleNamespace

from tests.support.edge_feed import agent_row
from tests.support.edge_harness import COOKIE, Agent, Connection, Edge, Reader, echo, eventually, saying

HOST = b"Host: app.test\r\n"


def test_a_download_is_cut_visibly_when_the_agent_breaks_off():
    with Edge(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", close=True)) as edge:
        received = edge.ask(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n", timeout=5)
        assert received.endswith(b"\r\n\r\nshort") and b"Content-Length: 100" in received
    with Edge(saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n", close=True)) as edge:
        received = edge.ask(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n", timeout=5)
        assert received.endswith(b"5\r\nshort\r\n") and not received.endswith(b"0\r\n\r\n")


def test_idempotent_requests_are_retried_once_and_others_are_not():
    """The agent closes a kept-alive connection just as the next request arrives."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    def script(connection: Connection) -> None:
        connection.body(connection.head())
        connection.send(answer)
        connection.head()  # the second request is read, and then the connection ends

    with Edge(script) as edge:
        for method, expected in ((b"GET", 200), (b"DELETE", 200), (b"PUT", 200), (b"POST", 502), (b"PATCH", 502)):
            with edge.connect() as sock:
                body = b"hi" if method in {b"PUT", b"POST", b"PATCH"} else b""
                request = (
                    method + b" / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: %d\r\n\r\n" % len(body) + body
                )
                reader = Reader(sock)
                sock.sendall(request)
                first = reader.answer().status
                sock.sendall(request)
                second = reader.answer().status
                assert {first, second} <= {200, expected} and (expected == 200 or 502 in {first, second})


def test_a_program_that_meets_an_agent_as_it_dies_waits_for_it_too():
    """The new connection was taken, and ends without a word: asked for again; what may change something is not."""
    for method, expected in ((b"GET", 200), (b"HEAD", 200), (b"DELETE", 502), (b"POST", 502)):
        taken = []

        def script(connection: Connection, taken: list[int] = taken) -> None:
            connection.head()
            taken.append(1)
            if len(taken) > 1:
                connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        with Edge(script) as edge:
            request = method + b" / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 0\r\n\r\n"
            assert edge.ask(request, timeout=3).startswith(b"HTTP/1.1 %d " % expected), method
        assert len(taken) == (2 if expected == 200 else 1)


def test_an_agent_that_goes_on_taking_connections_as_it_dies_is_waited_for():
    """A killed process takes connections until the kernel has put it away: both tries end without a word."""
    with Edge(lambda connection: connection.head() and None) as edge:
        other = Agent(echo)

        def revive() -> None:
            edge.feed.wait_for(lambda frame: frame["type"] == "dead")
            edge.feed.add(agents=(agent_row("alice", None, "starting"),))
            time.sleep(0.5)
            edge.feed.add(agents=(agent_row("alice", other.endpoint),))

        thread = threading.Thread(target=revive)
        thread.start()
        assert edge.get().status == 200
        thread.join()
        other.close()


def test_an_agent_that_never_answers_a_request_is_not_waited_for_long():
    with Edge(lambda connection: connection.head() and None) as edge:
        began = time.monotonic()
        answer = edge.get()
        assert answer.status == 502
        assert b"closed the connection" in answer.body
        assert time.monotonic() - began < 3


def test_the_id_on_a_page_about_a_failure_is_in_the_log_with_the_reason():
    told: list[tuple[str, dict]] = []
    with Edge(lambda connection: connection.head() and None, hold=0) as edge:
        edge.worker.context.logger = SimpleNamespace(warning=lambda what, **fields: told.append((what, fields)))
        asked = b"GET / HTTP/1.1\r\n" + HOST + COOKIE
        page = edge.ask(asked + b"Accept: text/html\r\nConnection: close\r\n\r\n", timeout=5).decode()
        edge.ask(asked + b"Connection: close\r\n\r\n", timeout=5)  # a program's, without a page
        shown = re.search(r"502 · request ([0-9a-f]{18})<", page)[1]
        why = "The application closed the connection"
        assert told == [("a request failed", {"agent": "alice", "request": shown, "why": why})]
        for _ in range(100):
            edge.ask(asked + b"Accept: text/html\r\nConnection: close\r\n\r\n", timeout=5)
        assert 60 <= len(told) < 100, "a bounded number"


def test_an_agent_that_lets_go_of_connections_at_once_hangs_nobody():
    """Its end may come before the request was written, between the loop's turns."""
    with Edge(lambda connection: None, hold=0) as edge:
        statuses = {edge.get().status for _ in range(200)}
    assert statuses <= {502, 503}


def test_a_repeated_body_is_kept_while_the_agent_comes_back():
    """The pooled connection ends under a PUT, and for a moment nobody listens."""

    def script(connection: Connection) -> None:
        connection.body(connection.head())
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        connection.head()

    with Edge(script, hold=5) as edge, edge.connect() as sock:
        reader = Reader(sock)
        put = b"PUT / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 5\r\n\r\nhello"
        sock.sendall(put)
        assert reader.answer().status == 200
        edge.agent.sock.shutdown(socket.SHUT_RDWR)
        edge.agent.sock.close()
        other = Agent(echo)
        sock.sendall(put)
        edge.feed.wait_for(lambda frame: frame["type"] == "dead")
        edge.feed.add(agents=(agent_row("alice", other.endpoint),))
        assert reader.answer().body.endswith(b"\r\n\r\nhello")
        other.close()


def test_the_waiting_page_and_not_the_old_request_is_asked_of_the_portal_when_the_agent_stays_away():
    """The kept connection ends under a GET, nobody listens, and the hold ends."""

    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        connection.head()

    with Edge(script, hold=1) as edge, edge.connect() as sock:
        reader = Reader(sock)
        get = b"GET /page HTTP/1.1\r\n" + HOST + COOKIE + b"Sec-Fetch-Mode: navigate\r\nAccept: text/html\r\n\r\n"
        sock.sendall(get)
        assert reader.answer().body == b"ok"
        edge.agent.sock.shutdown(socket.SHUT_RDWR)
        edge.agent.sock.close()
        sock.sendall(get)
        edge.feed.wait_for(lambda frame: frame["type"] == "dead")
        edge.feed.add(agents=(agent_row("alice", None, "starting"),))
        assert reader.answer().body.startswith(b"GET /auth/waiting HTTP/1.1\r\n")


def test_an_unsolicited_answer_is_not_used_for_the_next_request():
    said = threading.Event()

    def script(connection: Connection) -> None:
        first = True
        while connection.head():
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
            if first:
                time.sleep(0.1)
                connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
                said.set()
            first = False

    with Edge(script) as edge:
        assert edge.get().body == b"good"
        assert said.wait(5)
        eventually(lambda: not edge.worker.context.tables.agents["alice"].idle)
        assert edge.get().body == b"good"


def test_a_pool_is_reused():
    with Edge() as edge:
        for _ in range(20):
            assert edge.get().status == 200
        assert edge.agent.opened == 1


def test_a_client_that_leaves_takes_its_upstream_along():
    gone = threading.Event()

    def script(connection: Connection) -> None:
        connection.head()
        if connection.sock.recv(10) == b"":
            gone.set()

    with Edge(script) as edge:
        sock = edge.connect()
        sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
        eventually(lambda: edge.agent.heads)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        assert gone.wait(5)
        eventually(lambda: edge.worker.context.tables.agents["alice"].in_flight == 0)
