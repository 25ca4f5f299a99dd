"""Requests through the edge to an agent and back, judged by h11: framing, header rules, connections."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from tests.support.edge_harness import COOKIE, TOKEN, Connection, Edge, Reader, eventually, read_all, saying

HOST = b"Host: app.test\r\n"


@pytest.fixture(scope="module")
def edge():
    with Edge() as edge:
        yield edge


def test_a_get_reaches_the_agent_byte_for_byte(edge):
    path = "/a%2Fb//c;d/../e%C3%A9?x=1?y=%20&z='{|}'"
    answer = edge.get(path, b"Accept: text/plain", b"X-Odd:   spaced\t ")
    assert answer.status == 200
    assert answer.body.startswith(f"GET {path} HTTP/1.1\r\nHost: app.test\r\n".encode())
    assert b"\r\nX-Odd:   spaced\t \r\n" in answer.body
    assert b"\r\nAccept: text/plain\r\n" in answer.body


def test_an_8_kb_path_is_passed_on(edge):
    path = "/" + "a%2F" * 2000
    assert edge.get(path).body.startswith(f"GET {path} HTTP/1.1".encode())


def test_the_edge_says_who_and_where_from(edge):
    body = edge.get("/").body
    for line in (
        b"X-Forwarded-For: 127.0.0.1",
        b"X-Forwarded-Host: app.test",
        b"X-Forwarded-Proto: http",
        b"X-Dispatcher-User: alice",
        b"Via: 1.1 dispatcher",
    ):
        assert body.count(b"\r\n" + line + b"\r\n") == 1
    assert body.count(b"X-Request-ID: ") == 1


SPOOFED = [
    b"X-Dispatcher-User: root",
    b"X_Dispatcher_User: root",
    b"x-dispatcher_user: root",
    b"X-Dispatcher-Anything: root",
    b"X.Dispatcher.User: root",
    b"X!Forwarded!For: 6.6.6.6",
    b"x~forwarded'proto: evil",
    b"X.Real_IP: 6.6.6.6",
    b"Remote+User: root",
    b"X-Forwarded-Port: 666",
    b"X-Forwarded-For: 6.6.6.6",
    b"X_Forwarded_For: 6.6.6.6",
    b"X-Forwarded-Host: evil",
    b"X-Forwarded-Proto: evil",
    b"X-Forwarded-Prefix: /evil",
    b"Forwarded: for=6.6.6.6",
    b"X-Real-IP: 6.6.6.6",
    b"X_Real_IP: 6.6.6.6",
    b"X-Request-ID: evil",
    b"Remote-User: root",
    b"Remote_User: root",
    b"X-Remote-User: root",
    b"X-Original-URL: /evil",
    *(
        b"%b: evil" % name
        for name in (
            *(
                b"X-Auth-User",
                b"X_Auth_User",
                b"Front-End-Https",
                b"X-Forwarded-User",
                b"X-Auth-Request-Preferred",
            ),
            *(
                b"X-WEBAUTH-USER",
                b"X-Webauth-Role",
                b"X-Authentik-Username",
                b"Remote-Groups",
                b"X-SSL-Client-S-DN",
            ),
            *(b"Client-Cert", b"X-Goog-Authenticated-User-Email", b"X-MS-Client-Principal", b"X-Sendfile-Type"),
        )
    ),
    b"Proxy: http://evil",
    b"Proxy-Authorization: Basic evil",
    b"Keep-Alive: timeout=666",
    b"Connection: close, X-Secret-Hop\r\nX-Secret-Hop: evil",
]


@pytest.mark.parametrize("line", SPOOFED, ids=[line.partition(b":")[0].decode() for line in SPOOFED])
def test_identity_headers_of_a_client_are_dropped(edge, line):
    body = edge.get("/", line).body
    name, _, value = line.partition(b"\r\n")[0].partition(b": ")
    assert b"\r\n" + line.rpartition(b"\r\n")[2] + b"\r\n" not in body
    assert value == b"close, X-Secret-Hop" or value not in body
    assert b"evil" not in body and b"6.6.6.6" not in body and b"root" not in body


def test_connection_cannot_remove_headers_of_the_edge(edge):
    body = edge.get("/", b"Connection: X-Forwarded-For, X-Dispatcher-User, Host, close").body
    assert b"X-Forwarded-For: 127.0.0.1" in body
    assert b"X-Dispatcher-User: alice" in body
    assert b"Host: app.test" in body


def test_the_session_cookie_stays_here_and_others_pass_exactly(edge):
    body = edge.get(
        "/", cookie=b'Cookie: a=1;  b="x; y"; dispatcher=' + TOKEN.encode() + b";c=%20 3; dispatcher-device=z\r\n"
    ).body
    assert b'\r\nCookie: a=1;  b="x; y";c=%20 3\r\n' in body
    assert TOKEN.encode() not in body and b"dispatcher-device" not in body


def test_two_session_cookies_are_none(edge):
    double = b"Cookie: dispatcher=x0123456789abcdefghij; dispatcher=" + TOKEN.encode() + b"\r\n"
    assert edge.get("/", cookie=double).status == 401
    assert edge.get("/", cookie=COOKIE + COOKIE).status == 401


def test_keep_alive_and_pipelining(edge):
    with edge.connect() as sock:
        request = b"GET /%d HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n"
        sock.sendall(b"".join(request % n for n in range(20)))
        reader = Reader(sock)
        for n in range(20):
            assert reader.answer().body.startswith(b"GET /%d " % n)


def test_pipelining_behind_bodies_of_both_kinds(edge):
    with edge.connect() as sock:
        sock.sendall(
            b"POST /1 HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 5\r\n\r\nhello"
            b"POST /2 HTTP/1.1\r\n" + HOST + COOKIE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
            b"GET /3 HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n"
        )
        reader = Reader(sock)
        assert reader.answer().body.endswith(b"\r\n\r\nhello")
        assert reader.answer().body.endswith(b"3\r\nabc\r\n0\r\n\r\n")
        assert reader.answer().body.startswith(b"GET /3")


def test_connection_close_closes(edge):
    received = edge.ask(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"Connection: close\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in received


def test_http_1_0(edge):
    received = edge.ask(b"GET / HTTP/1.0\r\n" + COOKIE + b"\r\n")
    assert received.startswith(b"HTTP/1.1 200 OK\r\n") and b"Connection: close" in received
    assert b"Via: 1.0 dispatcher" in received
    with edge.connect() as sock:
        for _ in range(2):
            sock.sendall(b"GET / HTTP/1.0\r\n" + HOST + COOKIE + b"Connection: keep-alive\r\n\r\n")
            reader = Reader(sock)
            answer = reader.answer()
            assert answer.field(b"connection") == b"keep-alive"


def test_half_close_is_answered(edge):
    assert edge.ask(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n", shut=True).startswith(b"HTTP/1.1 200")


def thinking(seconds: float, noticed: threading.Event):
    """Return an agent that takes its time, and notices when nobody waits any more."""

    def script(connection: Connection) -> None:
        connection.head()
        connection.sock.settimeout(seconds)
        try:
            if connection.sock.recv(1) == b"":
                noticed.set()
        except TimeoutError:
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    return script


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_half_close_is_answered_late_too(version):
    with Edge(thinking(3, threading.Event())) as edge:
        answer = edge.ask(b"GET / HTTP/" + version + b"\r\nHost: a\r\n" + COOKIE + b"\r\n", shut=True)
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\nhi")


def test_a_client_that_closed_its_connection_does_not_hold_its_agent():
    noticed = threading.Event()
    with Edge(thinking(20, noticed), body_timeout=1, upstream_timeout=60) as edge:
        sock = edge.connect()
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n" + COOKIE + b"\r\n")
        eventually(lambda: edge.agent.heads)
        sock.close()
        assert noticed.wait(4), "the agent goes on for nobody"
        eventually(lambda: edge.worker.clients.open == 0)


def test_a_client_that_closed_its_connection_does_not_wait_for_a_sleeper():
    with Edge(agent_state="asleep", hold=60, body_timeout=1) as edge:
        sock = edge.connect()
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n" + COOKIE + b"\r\n")
        eventually(lambda: edge.worker.context.tables.agents["alice"].waiting)
        sock.close()
        eventually(lambda: not edge.worker.context.tables.agents["alice"].waiting)
        eventually(lambda: edge.worker.clients.open == 0)


def test_an_empty_line_before_a_request_is_ignored(edge):
    with edge.connect() as sock:
        for _ in range(2):
            sock.sendall(b"\r\nGET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
            assert Reader(sock).answer().status == 200


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_a_head_split_anywhere(edge, cut):
    request = b"GET /split HTTP/1.1\r\n" + HOST + COOKIE + b"X-A: b\r\n\r\n"
    with edge.connect() as sock:
        sock.sendall(request[:cut])
        time.sleep(0.003)
        sock.sendall(request[cut:])
        assert Reader(sock).answer().status == 200


def test_absolute_form_of_the_same_host_is_normalised(edge):
    answer = edge.ask(b"GET http://APP.test/x?y HTTP/1.1\r\n" + HOST + COOKIE + b"Connection: close\r\n\r\n")
    assert b"\r\n\r\nGET /x?y HTTP/1.1\r\nHost: app.test\r\n" in answer


def test_head_has_no_body_and_keeps_its_length():
    with Edge(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")) as edge, edge.connect() as sock:
        for _ in range(3):
            sock.sendall(b"HEAD / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
            answer = Reader(sock).answer("HEAD")
            assert answer.status == 200 and answer.field(b"content-length") == b"5000" and answer.body == b""
        assert edge.agent.opened == 1


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_a_body(status):
    with Edge(saying(b"HTTP/1.1 " + status + b"\r\nX-A: b\r\n\r\n")) as edge, edge.connect() as sock:
        for _ in range(3):
            sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
            assert Reader(sock).answer().status == int(status[:3])
        assert edge.agent.opened == 1


def test_a_chunked_answer_with_trailers():
    answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 42\r\nSet-Cookie: dispatcher=evil\r\nContent-Length: 7\r\n\r\n"
    )
    with Edge(saying(answer)) as edge:
        with edge.connect() as sock:
            for _ in range(2):
                sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
                got = Reader(sock).answer()
                assert got.body == b"hello world" and got.trailers == [(b"x-sum", b"42")]
        received = edge.ask(b"GET / HTTP/1.0\r\n" + HOST + COOKIE + b"\r\n")
        assert received.endswith(b"\r\n\r\nhello world") and b"hunked" not in received
        assert edge.agent.opened == 1


def test_an_answer_until_close_is_chunked_for_1_1_and_plain_for_1_0():
    with Edge(saying(b"HTTP/1.0 200 OK\r\n\r\nall of it", close=True)) as edge:
        with edge.connect() as sock:
            for _ in range(2):
                sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
                assert Reader(sock).answer().body == b"all of it"
        assert edge.ask(b"GET / HTTP/1.0\r\n" + HOST + COOKIE + b"\r\n").endswith(b"\r\n\r\nall of it")


def test_expect_100_continue_is_asked_of_the_agent():
    def script(connection: Connection) -> None:
        head = connection.head()
        assert b"\r\nExpect: 100-continue\r\n" in head and not connection.buffer
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = connection.body(head)
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with Edge(script) as edge, edge.connect() as sock:
        sock.sendall(b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"body")
        assert Reader(sock).answer().body == b"body"


def test_expect_without_a_session_gets_the_final_answer_at_once():
    with Edge() as edge:
        received = edge.ask(
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n", timeout=5
        )
        assert received.startswith(b"HTTP/1.1 401 ") and b"\r\nConnection: close\r\n" in received
        assert edge.get("/", b"Expect: a-miracle").status == 417
        assert not edge.agent.heads


def test_early_hints_pass_and_a_flood_of_them_does_not():
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    with (
        Edge(saying(hint * 3 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as edge,
        edge.connect() as sock,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
        reader = Reader(sock)
        assert reader.answer().body == b"ok" and reader.informational == [103] * 3
    with Edge(saying(hint * 5000)) as edge:
        received = edge.ask(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n", timeout=3)
        assert received.count(b"103 Early") <= 16


def test_early_hints_are_counted_for_each_request_of_a_kept_connection():
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    answer = hint * 3 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with Edge(saying(answer)) as edge, edge.connect() as sock:
        for _ in range(20):
            sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
            assert Reader(sock).answer().status == 200
        assert edge.agent.opened == 1


@pytest.mark.parametrize("status", [600, 999])
def test_a_connection_goes_on_after_a_status_that_no_standard_defines(status):
    with (
        Edge(saying(b"HTTP/1.1 %d Odd\r\nContent-Length: 2\r\n\r\nok" % status)) as edge,
        edge.connect(5) as sock,
    ):
        for _ in range(2):
            sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n")
            received = b""
            while not received.endswith(b"\r\n\r\nok"):
                received += sock.recv(4096)
            assert received.startswith(b"HTTP/1.1 %d Odd\r\n" % status)
        assert not edge.errors


def test_an_early_answer_to_an_upload_reaches_the_client():
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
        time.sleep(0.2)

    with Edge(script) as edge, edge.connect() as sock:
        sock.sendall(b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 100000000\r\n\r\n" + b"x" * 100000)
        answer = Reader(sock).answer()
        assert answer.status == 413 and answer.body == b"big" and answer.field(b"connection") == b"close"


def test_an_early_answer_reaches_the_client_also_when_the_agent_closes_at_once():
    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
        connection.sock.close()  # most of the body is unread: further writes fail

    head = b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 100000000\r\n\r\n"
    answers = []
    with Edge(script) as edge:
        for _ in range(40):
            with edge.connect() as sock:
                sock.settimeout(10)
                with contextlib.suppress(ConnectionError):
                    for piece in [head, *[b"x" * 65536] * 100]:
                        sock.sendall(piece)
                answers.append(Reader(sock).answer())
    assert [(one.status, one.body) for one in answers] == [(413, b"big")] * 40


def test_an_agent_that_reads_an_upload_late_is_waited_for_like_one_that_answers_late():
    size = 8 * 1024 * 1024

    def script(connection: Connection) -> None:
        head = connection.head()
        time.sleep(3)  # computing
        assert len(connection.body(head)) == size
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nread")

    request = b"PUT / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: %d\r\n\r\n" % size
    with Edge(script, body_timeout=1, upstream_timeout=20) as edge, edge.connect() as sock:
        sock.sendall(request + bytes(size))
        answer = Reader(sock).answer()
    assert (answer.status, answer.body) == (200, b"read")
    with Edge(script, body_timeout=20, upstream_timeout=1) as edge, edge.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(request + bytes(size))
        assert Reader(sock).answer().status == 504


def test_a_large_upload_and_download_stream_through():
    size = 64 * 1024 * 1024

    def script(connection: Connection) -> None:
        head = connection.head()
        received = len(connection.buffer)
        while received < size:
            received += len(connection.sock.recv(1 << 20))
        assert b"Content-Length: %d\r\n" % size in head
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        piece = b"y" * (1 << 20)
        for _ in range(size >> 20):
            connection.send(piece)

    with Edge(script) as edge, edge.connect() as sock:
        sock.sendall(
            b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % size
        )

        def upload():
            piece = b"x" * (1 << 20)
            for _ in range(size >> 20):
                sock.sendall(piece)

        threading.Thread(target=upload, daemon=True).start()
        count = 0
        while data := sock.recv(1 << 20):
            count += len(data)
        assert size < count < size + 2000


def test_no_session(edge):
    edge.agent.heads.clear()
    page = edge.get(
        "/lab?x=1&y=é".encode().decode("latin-1").replace("Ã©", "%C3%A9"), b"Accept: text/html", cookie=b""
    )
    assert page.status == 303
    assert page.field(b"location") == b"/auth/login?next=/lab%3Fx%3D1%26y%3D%25C3%25A9"
    assert page.field(b"cache-control") == b"no-store"
    assert edge.get("/", b"Sec-Fetch-Mode: navigate", cookie=b"").status == 303
    fetched = edge.get("/", b"Sec-Fetch-Mode: cors", b"Accept: text/html, */*", cookie=b"")
    assert fetched.status == 401
    program = edge.get("/", b"Accept: application/json", cookie=b"")
    assert program.status == 401 and program.field(b"content-type") == b"application/problem+json"
    assert edge.get("/", b"Accept: text/html", cookie=b"", method="POST").status == 401
    upgrade = edge.get("/", b"Connection: Upgrade", b"Upgrade: websocket", b"Accept: text/html", cookie=b"")
    assert upgrade.status == 401
    assert not edge.agent.heads


def test_the_portal_gets_its_paths_and_its_cookies(edge):
    answer = edge.get("/auth/login?next=/", b"X-Forwarded-For: 6.6.6.6")
    assert answer.body.startswith(b"GET /auth/login?next=/ HTTP/1.1\r\n")
    assert b"dispatcher=" + TOKEN.encode() in answer.body
    assert b"X-Forwarded-For: 127.0.0.1\r\n" in answer.body and b"6.6.6.6" not in answer.body
    assert b"X-Dispatcher-User" not in answer.body
    for path in ("/authx", "/auth.html", "//auth/login", "/%61uth/login", "/x/../auth/"):
        edge.agent.heads.clear()
        edge.get(path)
        assert edge.agent.heads, path
    assert edge.get("/auth/x", b"Content-Length: 2000000", method="POST").status == 413


def test_the_portal_gets_only_the_fields_that_it_reads(edge):
    given = b"Accept: text/html" + b" \t" * 2000 + b";q=1  ", b"Range: bytes=0-", b"X-Dispatcher-Agent: bob"
    body = edge.get(
        "/auth/login", *given, b"Content-Type:a/b", b"Content-Length: 2", method="POST", body=b"hi"
    ).body
    assert b"\r\nAccept: text/html ;q=1\r\n" in body and b"\r\nContent-Type: a/b\r\n" in body
    assert b"range" not in body.lower() and b"x-dispatcher" not in body.lower() and body.endswith(b"hi")
    many = tuple(b"User-Agent: " + b"a" * 1000 for _ in range(9))
    refused = edge.get("/auth/login", *many)
    assert refused.status == 431 and b"8192 bytes" in refused.body
    assert edge.get("/", *many).status == 200  # an agent


def test_read_all_is_quick(edge):
    start = time.monotonic()
    with edge.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"Connection: close\r\n\r\n")
        assert read_all(sock)
    assert time.monotonic() - start < 2


def test_an_agents_answer_has_one_field_for_caches_and_none_is_shared():
    said = b"HTTP/1.1 200 OK\r\nCache-Control: public, max-age=99999\r\nContent-Length: 0\r\n\r\n"
    with Edge(saying(said)) as edge:
        for lines, expected in (((), b"max-age=99999"), ((b"Accept: text/html",), b"no-store")):
            found = [value for name, value in edge.get("/", *lines).fields if name == b"cache-control"]
            assert found == [b"private, " + expected]  # over plain HTTP no sign-out clears a cached page


def test_a_browser_with_too_many_cookies_gets_a_page_that_expires_them():
    with Edge(head_bytes=8192) as edge:
        cookies = COOKIE[:-2] + b"".join(b"; app%d=%b" % (number, b"x" * 1000) for number in range(20)) + b"\r\n"
        page = edge.get("/auth/login", cookie=b"Accept: text/html\r\n" + cookies)
        assert page.status == 431 and b"Too many cookies for this address" in page.body
        assert page.field(b"content-type").startswith(b"text/html")
        expired = {value.partition(b"=")[0] for name, value in page.fields if name == b"set-cookie"}
        assert {b"app0", b"app6"} <= expired <= {b"app%d" % number for number in range(20)}
        for kind, path, field in ((b"application/json", "/", cookies), (b"text/html", "/" + "a" * 9000, COOKIE)):
            answer = edge.get(path, cookie=b"Accept: " + kind + b"\r\n" + field)
            assert answer.status == 431 and answer.field(b"set-cookie") is None
        assert not edge.agent.heads and not edge.portal.heads
