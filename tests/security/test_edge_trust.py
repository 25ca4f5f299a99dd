"""Clients and agents that do not play by the rules: smuggling, hostile answers, slow and stuck peers."""

from __future__ import annotations

import gc
import os
import re
import shutil
import socket
import subprocess
import threading
import time

import psutil

import pytest

from tests.support.edge_feed import agent_row
from tests.support.edge_harness import COOKIE, TOKEN, Connection, Edge, Reader, eventually, read_all, saying
from tests.unit.proxy.edge.http.test_http import BAD_ANSWERS, OWN_COOKIES, REFUSED

HOST = b"Host: app.test\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n"


@pytest.fixture(scope="module")
def edge():
    with Edge() as edge:
        yield edge


def with_cookie(head: bytes) -> bytes:
    return head.replace(b"\r\n\r\n", b"\r\n" + COOKIE + b"\r\n", 1)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "HTTP/0.9"])
def test_ambiguous_requests_are_refused_and_nothing_after_them_is_read(edge, name):
    head, status = REFUSED[name]
    edge.agent.heads.clear()
    received = edge.ask(with_cookie(head) + b"5\r\nhello\r\n0\r\n\r\n" + SMUGGLED, timeout=5)
    assert received.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close\r\n" in received and received.count(b"HTTP/1.1 ") == 1
    assert not edge.agent.heads


BODIES = {
    "chunk-size overflow": b"FFFFFFFFFFFFFFFF1\r\nhello",
    "a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "bare LF": b"5\nhello\n0\n\n",
    "a chunk that is longer than it says": b"3\r\nhello\r\n0\r\n\r\n",
    "junk": b"hello\r\n",
    "a bare CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_chunks_end_the_request(edge, name):
    edge.agent.heads.clear()
    received = edge.ask(
        b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Transfer-Encoding: chunked\r\n\r\n" + BODIES[name] + SMUGGLED,
        timeout=5,
    )
    assert received.startswith(b"HTTP/1.1 400 ") and received.count(b"HTTP/1.1 ") == 1
    assert not any(b"smuggled" in head for head in edge.agent.heads)


def test_chunk_extensions_and_hostile_trailers_do_not_reach_the_agent(edge):
    with edge.connect() as sock:
        sock.sendall(
            b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Transfer-Encoding: chunked\r\n\r\n"
            b"5;evil=1\r\nhello\r\n0;evil\r\nX-Dispatcher-User: evil\r\nContent-Length: 9\r\nX-Good: 1\r\n\r\n"
        )
        eventually(lambda: edge.agent.heads)
        sock.settimeout(1)
        # The agent's script waits for an end without trailers; what it got shows in the next answer.
        with pytest.raises(TimeoutError):
            sock.recv(1000)


def test_a_body_beyond_content_length_is_the_next_request(edge):
    with edge.connect() as sock:
        sock.sendall(
            b"POST /1 HTTP/1.1\r\n"
            + HOST
            + COOKIE
            + b"Content-Length: 3\r\n\r\nabcGET /2 HTTP/1.1\r\n"
            + HOST
            + b"\r\n"
        )
        reader = Reader(sock)
        assert reader.answer().body.endswith(b"abc")
        assert reader.answer().status == 401, "it has no session, whatever came before it"


def test_a_get_with_a_body_keeps_its_place(edge):
    with edge.connect() as sock:
        sock.sendall(b"GET /1 HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 3\r\n\r\nabc" + GET)
        reader = Reader(sock)
        assert reader.answer().body.endswith(b"\r\n\r\nabc") and reader.answer().status == 200


def test_not_http_at_all(edge):
    for data in (
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
        b"\0\0\0\0",
        b"SSH-2.0-OpenSSH\r\n",
        b"{}",
        b"\r\n\r\n\r\n\r\nGET",
    ):
        received = edge.ask(data, timeout=5, shut=True)
        assert received == b"" or received.startswith(b"HTTP/1.1 4"), data


def test_heads_are_bounded():
    with Edge(head_bytes=4096, head_fields=20) as edge:
        assert edge.get("/", b"X-A: " + b"b" * 3000).status == 200
        assert edge.get("/", b"X-A: " + b"b" * 5000).status == 431
        assert edge.get("/" + "a" * 5000).status == 431
        assert edge.get("/", *[b"X-A: b"] * 30).status == 431
        endless = edge.connect()
        sent = 0
        with pytest.raises((BrokenPipeError, ConnectionResetError, TimeoutError)):
            endless.settimeout(3)
            while sent < 20_000_000:
                endless.sendall(b"X-Endless: header\r\n" * 1000 if sent else b"GET / HTTP/1.1\r\n")
                sent += 19000
        endless.close()
        assert sent < 19_000_000


# Answers.


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_become_502_and_the_connection_is_not_used_again(name):
    with Edge(saying(BAD_ANSWERS[name] + b"hello", close=True)) as edge:
        for _ in range(2):
            answer = edge.get()
            assert answer.status == 502 and answer.field(b"content-type") == b"application/problem+json"
        assert edge.agent.opened == 2
        assert edge.worker.context.tables.agents["alice"].in_flight == 0


@pytest.mark.parametrize(
    "parts",
    [
        [b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-By: script\n", b"\r\nok"],
        [b"HTTP/1.1 200 OK\nContent-Length: 2\n", b"\n", b"ok"],
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [b"HTTP/2 200\r\n"],
        [b"Content-Type: text/html\n\n<html>"],
    ],
)
def test_nobody_waits_for_the_rest_of_an_answer_that_cannot_become_one(parts):
    def script(connection: Connection) -> None:
        while connection.head():
            for part in parts:
                connection.send(part)
                time.sleep(0.05)

    with Edge(script) as edge:
        began = time.monotonic()
        assert edge.get().status == 502
        assert time.monotonic() - began < 4


def test_an_answer_in_single_bytes_is_read():
    def script(connection: Connection) -> None:
        while connection.head():
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok":
                connection.send(bytes([byte]))
                time.sleep(0.005)

    with Edge(script) as edge:
        assert edge.get().body == b"ok"


def test_an_endless_head_is_cut():
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\n")
        for _ in range(700):
            connection.send(b"X-Endless: " + b"x" * 15000 + b"\r\n")

    with Edge(script) as edge:
        assert edge.get().status == 502


@pytest.mark.parametrize(
    "body", [b"zz\r\n", b"5\r\nhelloXX", b"-5\r\n", b"5;" + b"x" * 5000, b"0\r\n folded: x\r\n\r\n"]
)
def test_bad_chunks_of_an_agent_break_the_answer_off(body):
    with Edge(saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n" + body)) as edge:
        assert edge.get().status == 502

    def later(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        time.sleep(0.2)
        connection.send(body)

    with Edge(later) as edge:
        received = edge.ask(GET, timeout=5)
        assert received.endswith(b"3\r\nabc\r\n") and received.count(b"HTTP/1.1") == 1
        eventually(lambda: edge.worker.context.tables.agents["alice"].in_flight == 0)


def test_an_answer_longer_than_it_says_is_cut_and_poisons_nothing():
    with Edge(
        saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngoodHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    ) as edge:
        for _ in range(3):
            assert edge.get().body == b"good"
        assert edge.agent.opened == 3


def test_a_body_in_the_answer_to_head_poisons_nothing():
    with Edge(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")) as edge, edge.connect() as sock:
        reader = Reader(sock)
        sock.sendall(b"HEAD / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
        assert reader.answer("HEAD").status == 200
        sock.sendall(GET)
        assert reader.answer().body == b"evil" and edge.agent.opened == 2


def test_101_that_nobody_asked_for():
    with Edge(
        saying(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    ) as edge:
        assert edge.get().status == 502


@pytest.mark.parametrize("cookie", OWN_COOKIES)
def test_an_agent_cannot_set_the_session_cookie(cookie):
    with Edge(
        saying(b"HTTP/1.1 200 OK\r\nSet-Cookie: " + cookie + b"\r\nSet-Cookie: own=1\r\nContent-Length: 0\r\n\r\n")
    ) as edge:
        answer = edge.get()
        assert answer.status == 200 and [v for n, v in answer.fields if n == b"set-cookie"] == [b"own=1"]


def test_service_workers_that_would_cover_the_portal(edge):
    for path, status in (("/sw.js", 403), ("/auth/../sw.js", 200), ("/app/sw.js", 200), ("/sw.js?x=/app/", 403)):
        assert edge.get(path, b"Service-Worker: script", b"Sec-Fetch-Dest: serviceworker").status == status, path
    assert edge.get("/sw.js").status == 200
    allowed = b"HTTP/1.1 200 OK\r\nService-Worker-Allowed: /%b\r\nContent-Length: 0\r\n\r\n"
    with Edge(saying(allowed % b"")) as wide, Edge(saying(allowed % b"app/")) as narrow:
        assert wide.get("/app/sw.js", b"Service-Worker: script").field(b"service-worker-allowed") is None
        assert narrow.get("/app/sw.js", b"Service-Worker: script").field(b"service-worker-allowed") == b"/app/"


def test_a_websocket_from_another_origin_is_refused(edge):
    upgrade = (b"Connection: Upgrade", b"Upgrade: websocket")
    edge.agent.heads.clear()
    assert edge.get("/ws", *upgrade, b"Origin: http://evil.test").status == 403
    assert edge.get("/ws", *upgrade, b"Origin: null").status == 403
    assert edge.get("/ws", *upgrade, b"Origin: https://app.test").status == 403
    assert not edge.agent.heads
    assert edge.get("/ws", *upgrade, b"Origin: http://app.test").status == 200
    assert edge.get("/ws", *upgrade).status == 200, "programs send no Origin"


# Slow and stuck peers.


def test_a_head_at_one_byte_a_second_is_cut():
    with Edge(head_timeout=1.5) as edge, edge.connect() as sock:
        start = time.monotonic()
        sock.settimeout(0.4)
        received = b""
        for byte in GET:
            try:
                sock.sendall(bytes([byte]))
                received += sock.recv(1000)
                break
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 ") and time.monotonic() - start < 4


def test_a_connection_without_a_word_is_closed():
    with Edge(head_timeout=0.5, idle_timeout=0.5) as edge:
        start = time.monotonic()
        assert edge.ask(b"", timeout=5) == b""
        with edge.connect(5) as sock:
            sock.sendall(GET)
            assert Reader(sock).answer().status == 200
            assert sock.recv(1) == b""
        assert time.monotonic() - start < 5


def test_a_body_that_stops_is_cut():
    with Edge(body_timeout=0.7) as edge, edge.connect(6) as sock:
        start = time.monotonic()
        sock.sendall(b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 100\r\n\r\nhello")
        assert read_all(sock).startswith(b"HTTP/1.1 408 ") and time.monotonic() - start < 4
        eventually(lambda: edge.worker.context.tables.agents["alice"].in_flight == 0)


def test_an_agent_that_does_not_answer():
    with Edge(lambda connection: (connection.head(), time.sleep(8)), upstream_timeout=0.7) as edge:
        start = time.monotonic()
        answer = edge.get()
        assert answer.status == 504 and time.monotonic() - start < 3
        assert edge.get("/", b"Accept: text/html").field(b"content-type") == b"text/html; charset=utf-8"


def test_a_request_that_got_no_answer_is_not_sent_in_place_of_the_next():
    def script(connection: Connection) -> None:
        while head := connection.head():
            if b" /stuck " in head:
                time.sleep(3)
                return
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(head) + head)

    with Edge(script, upstream_timeout=0.6) as edge, edge.connect() as sock:
        reader = Reader(sock)
        for path, status in ((b"/a", 200), (b"/stuck", 504), (b"/b", 200)):
            sock.sendall(GET.replace(b"/ ", path + b" ", 1))
            answer = reader.answer()
            assert answer.status == status
            assert status != 200 or answer.body.startswith(b"GET " + path + b" ")
        assert [head.split()[1] for head in edge.agent.heads] == [b"/a", b"/stuck", b"/b"]


def test_a_slow_stream_is_not_cut_by_the_upstream_timeout():
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        time.sleep(2)
        connection.send(b"data: 1\n\n")

    with Edge(script, upstream_timeout=0.5, body_timeout=0.5, idle_timeout=0.5) as edge:
        assert edge.get().body == b"data: 1\n\n"


PIECE = b"x" * 1000000


def endless(connection: Connection) -> None:
    connection.head()
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        connection.send(PIECE)


def test_readers_that_stop_cost_little_memory_and_affect_no_other_client():
    with Edge(endless, body_timeout=2.5) as edge:
        gc.collect()
        before = psutil.Process().memory_info().rss
        socks = [edge.connect() for _ in range(40)]
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(GET)
        (session,) = edge.worker.context.tables.sessions.values()
        eventually(lambda: edge.do(lambda: sum(each.write_paused for each in session.connections or ())) == 40, 60)
        grown = psutil.Process().memory_info().rss - before
        assert grown < 40 * 700_000 + 30_000_000, f"{grown} bytes for 40 stuck readers"
        edge.agent.script = saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        start = time.monotonic()
        assert edge.get().body == b"ok" and time.monotonic() - start < 10, "others are served"
        eventually(lambda: edge.worker.clients.open == 0, 60)
        for sock in socks:
            sock.close()


def test_a_reader_that_is_slow_but_reads_is_served():
    size = 12_000_000
    with Edge(
        saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size), body_timeout=1
    ) as edge:
        with edge.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sock.sendall(GET)
            count = 0
            start = time.monotonic()
            while count < size and (data := sock.recv(50000)):
                count += len(data)
                if time.monotonic() - start < 3.5:
                    time.sleep(0.03)
            assert count > size and time.monotonic() - start > 3


def test_an_agent_that_does_not_read_holds_the_client_back():
    with (
        Edge(lambda connection: (connection.head(), time.sleep(4)), body_timeout=1.0) as edge,
        edge.connect(2) as sock,
    ):
        gc.collect()
        before = psutil.Process().memory_info().rss
        sock.sendall(b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 1000000000\r\n\r\n")
        sent = 0
        with pytest.raises((TimeoutError, ConnectionError)):
            while sent < 100_000_000:
                sock.sendall(b"x" * 100000)
                sent += 100000
        assert sent < 60_000_000 and psutil.Process().memory_info().rss - before < 40_000_000


def test_connections_are_bounded_in_all_and_by_address():
    with Edge(connections=20) as edge:
        socks = [edge.connect() for _ in range(20)]
        eventually(lambda: edge.worker.clients.open == 20)
        assert edge.ask(GET, timeout=3).startswith(b"HTTP/1.1 503 ")
        socks.pop().close()
        eventually(lambda: edge.worker.clients.open == 19)
        assert edge.get().status == 200
        for sock in socks:
            sock.close()
    with Edge(connections_per_address=3) as edge:
        socks = [edge.connect() for _ in range(10)]
        eventually(lambda: edge.worker.clients.open == 10)
        assert edge.get().status == 200, "loopback is exempt"
        edge.worker.clients.proxies._peers["127.0.0.1"] = (b"1.2.3.4", False, False)
        assert edge.ask(GET, timeout=3).startswith(b"HTTP/1.1 503 ")
        for sock in socks:
            sock.close()


def test_requests_in_flight_are_bounded_for_an_agent():
    release = threading.Event()

    def script(connection: Connection) -> None:
        connection.head()
        release.wait(10)
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with Edge(script, in_flight_per_agent=3) as edge:
        socks = [edge.connect() for _ in range(3)]
        for sock in socks:
            sock.sendall(GET)
        eventually(lambda: edge.worker.context.tables.agents["alice"].in_flight == 3)
        assert edge.get().status == 503
        assert edge.get("/auth/login").status == 200, "the portal is another matter"
        release.set()
        for sock in socks:
            assert Reader(sock).answer().status == 200
            sock.close()
        assert edge.get().status == 200


def test_a_flood_of_pipelined_requests_is_held_back():
    with Edge(lambda connection: (connection.head(), time.sleep(3))) as edge, edge.connect(1) as sock:
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 200_000_000:
                sock.sendall(GET * 1000)
                sent += len(GET) * 1000
        assert sent < 50_000_000


# The log.


def test_the_access_log_is_json_without_secrets(tmp_path):
    path = tmp_path / "access.log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Edge(log_fd=fd) as edge:
        edge.get("/a%0Ab?token=hunter2", b"Authorization: Bearer hunter2", b"Referer: http://x/?hunter2")
        edge.get("/auth/login")
        edge.get("/", cookie=b"")
        edge.get("/\"quote'")
        edge.ask(b"BAD\r\n\r\n", timeout=3)
        edge.feed.add(agents=(agent_row("alice", "tcp:127.0.0.1:9"),))
    os.close(fd)
    import json

    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines[:4]] == [200, 200, 401, 200]
    first = lines[0]
    assert (
        first["path"] == "/a%0Ab"
        and first["query"] is True
        and first["user"] == "alice"
        and first["app"] == "demo"
    )
    assert (
        first["client"] == "127.0.0.1"
        and first["method"] == "GET"
        and first["out"] > 100
        and 0 <= first["ms"] < 5000
    )
    assert lines[1]["agent"] is None and lines[2]["user"] is None and lines[3]["path"] == "/\"quote'"
    assert "hunter2" not in text and TOKEN not in text
    assert re.fullmatch(r"[0-9a-f]{18}", first["id"])


NGINX = """
daemon off; pid {base}/pid; error_log {base}/log; user {user};
events {{}}
http {{
  access_log off;
  client_body_temp_path {base}/body; proxy_temp_path {base}/proxy; fastcgi_temp_path {base}/f; uwsgi_temp_path {base}/u;
  scgi_temp_path {base}/s; proxy_cache_path {base}/cache keys_zone=all:1m;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{edge}; proxy_set_header Host $http_host; proxy_cache all; proxy_cache_key $uri;
    }}
    location /operators/ {{ internal; alias {base}/operators/; }}
  }}
}}
"""


@pytest.mark.parametrize(
    "field",
    [b"X-Accel-Redirect: /operators/secret", b"X-Accel-Expires: 600", b"CDN-Cache-Control: max-age=600"],
)
def test_an_agent_cannot_command_nginx(field, tmp_path, free_port):
    """It reads no location of the operator's, and no cache keeps its pages longer than the session."""
    if not shutil.which("nginx"):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("nginx is not installed")
    (tmp_path / "operators").mkdir()
    (tmp_path / "operators/secret").write_text("of the operator")
    user = "root" if os.geteuid() == 0 else str(os.geteuid())
    answer = saying(b"HTTP/1.1 200 OK\r\n" + field + b"\r\nContent-Length: 5\r\n\r\nhello")

    def page() -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", free_port), 10) as sock:
                sock.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                return read_all(sock).partition(b"\r\n\r\n")[2]
        except ConnectionRefusedError:
            return b""

    with Edge(answer) as edge:
        (tmp_path / "conf").write_text(NGINX.format(base=tmp_path, user=user, port=free_port, edge=edge.port))
        command = ["nginx", "-c", tmp_path / "conf", "-p", tmp_path, "-e", tmp_path / "log"]
        nginx = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            pages = [eventually(page, 20), page(), page()]
        finally:
            nginx.terminate()
            nginx.wait(10)
    assert pages == [b"hello"] * 3
    assert len(edge.agent.heads) == 3, "a cache answered"
