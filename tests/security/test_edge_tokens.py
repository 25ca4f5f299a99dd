"""API tokens at the edge: which app they open, what the app gets to see, and every way to use one wrongly."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time

import pytest

from tests.support.edge_feed import agent_row, session_row
from tests.support.edge_harness import BOB, COOKIE, TOKEN, Agent, Edge, Reader, echo, eventually

API = "dsp_" + "alice-0123456789abcdefghijklmnopqrstuvwxyzA"
BOBS = "dsp_" + "bob---0123456789abcdefghijklmnopqrstuvwxyzB"
BEARER = b"Authorization: Bearer " + API.encode()
UPGRADE = (
    b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
)  # fmt: skip
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
PAGE = (b"Accept: text/html", b"Sec-Fetch-Mode: navigate", b"Upgrade-Insecure-Requests: 1")


def started():
    with Edge(hold=2) as edge:
        edge.feed.add(tokens=(session_row(API, "alice", None),))
        eventually(lambda: edge.worker.context.tables.tokens)
        yield edge


@pytest.fixture
def edge():
    yield from started()


@pytest.fixture(scope="module")
def one():
    yield from started()


@pytest.fixture
def shared(one):
    """For tests that change nothing."""
    one.agent.heads.clear()
    one.portal.heads.clear()
    return one


def get(edge, *lines, path="/", cookie=b"", **more):
    return edge.get(path, *lines, cookie=cookie, **more)


def problem(answer, status, code):
    """Whether an answer is a problem document for a program."""
    assert answer.status == status, answer.body
    assert answer.field(b"content-type") == b"application/problem+json"
    assert answer.field(b"set-cookie") is None and answer.field(b"location") is None
    document = json.loads(answer.body)
    assert document["code"] == code and API not in json.dumps(document)
    return document


def test_a_token_opens_its_users_app_and_the_app_does_not_see_it(shared):
    answer = get(shared, BEARER, b"X-Other: kept", b"Cookie: app=1")
    assert answer.status == 200
    head = shared.agent.heads[-1]
    assert (
        b"X-Dispatcher-User: alice\r\n" in head and b"X-Other: kept\r\n" in head and b"Cookie: app=1\r\n" in head
    )
    assert b"authorization" not in head.lower() and API.encode() not in head
    assert answer.field(b"set-cookie") is None
    assert b"Authorization" in answer.field(b"vary")
    assert shared.feed.of_type("lookup") == []


@pytest.mark.parametrize("name", [b"authorization", b"AUTHORIZATION", b"aUTHORIZATION"])
@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER", b"  bEaReR   "])
def test_every_spelling_of_the_field_and_the_scheme(shared, name, scheme):
    assert get(shared, name + b":" + scheme + b" " + API.encode() + b" \t").status == 200
    assert API.encode() not in shared.agent.heads[-1]


@pytest.mark.parametrize(
    "value",
    [
        b"Basic YWxpY2U6eA==",
        b"Bearer eyJhbGciOiJ9.dsp_abcdsp_x",
        b"Bearer DSP_x",
        b"token ghp_dsp_0123",
        b"",
        b"Bearer",
    ],
)
def test_other_authorization_fields_are_the_apps(shared, value):
    assert get(shared, b"Authorization: " + value, cookie=COOKIE).status == 200
    assert b"Authorization: " + value + b"\r\n" in shared.agent.heads[-1]
    problem(get(shared, b"Authorization: " + value), 401, "unauthenticated")


def test_unknown_expired_revoked_and_malformed_tokens_are_refused_alike(edge):
    short = "dsp_" + "x" * 43
    edge.feed.add(tokens=(session_row(short, "alice", 0.0),))
    eventually(lambda: len(edge.worker.context.tables.tokens) == 2)
    edge.feed.remove(tokens=(API,))
    eventually(lambda: len(edge.worker.context.tables.tokens) == 1)
    values = [
        API, short, "dsp_" + "u" * 43, "dsp_", API[:-1], API + "x", API + " x", API + "=", f'"{API}"', "dsp_" + "x" * 6000,
    ]  # fmt: skip
    fields = [f"Bearer {value}" for value in values]
    fields += [API, f"Token {API}", f"Basic {API}", f"Bearer\t{API}", f"Bearer x {API}", f"Digest t={API}"]
    answers = [get(edge, b"Authorization: " + field.encode(), *PAGE, cookie=COOKIE) for field in fields]
    assert len({answer.body for answer in answers}) == 1
    for answer in answers:
        problem(answer, 401, "invalid-token")
        assert answer.field(b"www-authenticate") == b'Bearer realm="dispatcher", error="invalid_token"'
    assert edge.agent.heads == [] and edge.portal.heads == []
    assert edge.feed.of_type("lookup") == [], "guesses cost the manager nothing"


@pytest.mark.parametrize(
    "lines",
    [
        (BEARER, BEARER),
        (BEARER, b"Authorization: Basic YWxpY2U6eA=="),
        (b"Authorization: Basic YWxpY2U6eA==", BEARER),
        (b"authorization: Bearer app", b"AUTHORIZATION: Bearer " + API.encode()),
        (BEARER + b", Basic YWxpY2U6eA==",),
        (b"Authorization: Basic x,Bearer " + API.encode(),),
    ],
)
def test_a_token_beside_another_credential_is_ambiguous(shared, lines):
    problem(get(shared, *lines, cookie=COOKIE), 400, "bad-request")
    assert shared.agent.heads == []


def smuggled(edge, head):
    """Send a head as it is, with alice's session; return whether the app got the token."""
    edge.ask(b"GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n" + COOKIE + head + b"\r\n", timeout=1)
    return any(API.encode() in each for each in edge.agent.heads)


@pytest.mark.parametrize(
    "head",
    [
        b"Authorization : Bearer %s\r\n",
        b" Authorization: Bearer %s\r\n",
        b"X: y\r\n Authorization: Bearer %s\r\n",
        b"Authorization: x\r\n Bearer %s\r\n",
        b"X: y\rAuthorization: Bearer %s\r\n",
        b"X: y\nAuthorization: Bearer %s\r\n",
        b"Authorization\x00: Bearer %s\r\n",
        b"Connection: authorization\r\nAuthorization: Bearer %s\r\n",
        b"Authorization: Bearer\x0b%s\r\n",
        b"Proxy-Authorization: Bearer %s\r\n",
    ],
)
def test_no_form_of_the_field_carries_a_token_into_an_app(shared, head):
    assert not smuggled(shared, head % API.encode())


def test_a_trailer_is_no_field(shared):
    body = b"1\r\nx\r\n0\r\nAuthorization: Bearer " + API.encode() + b"\r\n\r\n"
    request = b"POST / HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
    assert b" 200 " in shared.ask(request + COOKIE + b"\r\n" + body, timeout=3)
    assert not any(API.encode() in head for head in shared.agent.heads)
    assert b" 401 " in shared.ask(request + b"\r\n" + body, timeout=3)


@pytest.mark.parametrize("name", ["token", "access_token", "authorization"])
def test_a_token_in_the_query_or_a_cookie_opens_nothing(shared, name):
    problem(get(shared, path=f"/?{name}={API}"), 401, "unauthenticated")
    problem(get(shared, cookie=f"Cookie: dispatcher={API}; {name}={API}\r\n".encode()), 401, "unauthenticated")
    problem(get(shared, f"X-Auth-Token: {API}".encode()), 401, "unauthenticated")


def test_a_session_is_no_token(edge):
    """Even one that has the form of a token."""
    session = "dsp_" + "s" * 43
    edge.feed.add(sessions=(session_row(session, "alice"),))
    eventually(lambda: len(edge.worker.context.tables.sessions) == 2)
    assert get(edge, cookie=f"Cookie: dispatcher={session}\r\n".encode()).status == 200
    problem(get(edge, f"Authorization: Bearer {session}".encode()), 401, "invalid-token")
    problem(get(edge, f"Authorization: Bearer {TOKEN}".encode()), 401, "unauthenticated")


def add_bob(edge):
    other = Agent(echo)
    edge.feed.add(
        agents=(agent_row("bob", other.endpoint),),
        sessions=(session_row(BOB, "bob"),),
        tokens=(session_row(BOBS, "bob", None),),
    )
    eventually(lambda: len(edge.worker.context.tables.tokens) == 2)
    return other


def test_the_token_wins_against_the_cookie_of_another_person_and_only_the_token_is_used(edge):
    bob = add_bob(edge)
    assert get(edge, BEARER, cookie=f"Cookie: dispatcher={BOB}\r\n".encode()).status == 200
    assert b"X-Dispatcher-User: alice" in edge.agent.heads[-1] and bob.heads == []
    assert BOB.encode() not in edge.agent.heads[-1]
    edge.do(edge.worker.report)
    report = edge.feed.wait_for(lambda frame: frame["type"] == "activity" and frame["tokens"])
    assert report["tokens"] == [hashlib.sha256(API.encode()).hexdigest()] and report["sessions"] == []
    bob.close()


def test_requests_of_one_connection_do_not_inherit_the_identity(edge):
    bob = add_bob(edge)
    head = b"GET / HTTP/1.1\r\nHost: app.test\r\n"
    with edge.connect() as sock:
        reader = Reader(sock)
        for lines, status in (
            (BEARER + b"\r\n", 200),
            (b"", 401),
            (b"Cookie: dispatcher=" + BOB.encode() + b"\r\n", 200),
            (b"", 401),
            (b"Authorization: Bearer dsp_" + b"x" * 43 + b"\r\n", 401),
            (b"Authorization: Bearer " + BOBS.encode() + b"\r\n", 200),
        ):
            sock.sendall(head + lines + b"\r\n")
            assert reader.answer().status == status
    assert len(edge.agent.heads) == 1 and len(bob.heads) == 2
    bob.close()


def test_a_token_of_a_removed_user_opens_nothing_of_the_next_one_of_that_name(edge):
    edge.feed.add(agents=(agent_row("alice", edge.agent.endpoint, user_id=4711),))
    eventually(lambda: edge.worker.context.tables.agents["alice"].user_id == 4711)
    problem(get(edge, BEARER), 404, "not-found")
    assert edge.agent.heads == []


@pytest.mark.parametrize("path", ["/auth/", "/auth", "/auth/account", "/auth/events?agent=alice", "/auth/login"])
@pytest.mark.parametrize("cookie", [b"", COOKIE])
def test_a_token_opens_no_page_of_the_portal(shared, path, cookie):
    for method in ("GET", "POST"):
        lines = (BEARER, b"Content-Length: 0") if method == "POST" else (BEARER,)
        problem(get(shared, *lines, *PAGE, path=path, cookie=cookie, method=method), 403, "not-for-tokens")
    assert shared.portal.heads == []


def test_changes_of_a_program_need_no_origin(shared):
    for method in ("POST", "DELETE", "PUT"):
        assert get(shared, BEARER, b"Content-Length: 0", method=method).status == 200


def test_a_sleeping_app_is_woken_and_the_program_waits(edge):
    edge.feed.add(agents=(agent_row("alice", None, "asleep"),))
    eventually(lambda: edge.worker.context.tables.agents["alice"].state == "asleep")
    edge.feed.on_wake = lambda name: edge.feed.add(agents=(agent_row(name, edge.agent.endpoint),))
    assert get(edge, BEARER).status == 200
    assert edge.feed.of_type("wake") == [{"type": "wake", "agent": "alice"}]


@pytest.mark.parametrize("state", ["failed", "starting"])
def test_an_app_that_does_not_run_is_told_to_programs_as_a_problem(edge, state):
    edge.settings.hold = 0.3
    edge.feed.add(agents=(agent_row("alice", None, state),))
    eventually(lambda: edge.worker.context.tables.agents["alice"].state == state)
    problem(get(edge, BEARER, *PAGE), 503, f"agent-{state}")
    assert edge.portal.heads == []


def websocket(edge, *lines):
    sock = edge.connect()
    sock.sendall(
        b"GET /ws HTTP/1.1\r\nHost: app.test\r\n"
        + b"".join(line + b"\r\n" for line in (*UPGRADE, *lines))
        + b"\r\n"
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    return sock, head


def switching(connection):
    connection.head()
    connection.send(SWITCH)
    while data := connection.sock.recv(4096):
        connection.send(data)


def test_a_websocket_opens_with_a_token_and_ends_with_it():
    with Edge(switching) as edge:
        edge.feed.add(tokens=(session_row(API, "alice", None),))
        eventually(lambda: edge.worker.context.tables.tokens)
        sock, head = websocket(edge, BEARER)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert API.encode() not in edge.agent.heads[-1]
        sock.sendall(b"\x81\x82\0\0\0\0hi")
        assert sock.recv(100) == b"\x81\x82\0\0\0\0hi"
        began = time.monotonic()
        edge.feed.remove(tokens=(API,))
        assert sock.recv(100)[:1] == b"\x88", "no Close frame"
        assert time.monotonic() - began < 2
        sock.close()
        sock, head = websocket(edge, BEARER)
        assert head.startswith(b"HTTP/1.1 401 ")
        sock.close()


def slow(connection):
    connection.head()
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nbegin")
    connection.sock.recv(1)


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_a_download_ends_with_its_token(end):
    with Edge(slow) as edge:
        edge.feed.add(tokens=(session_row(API, "alice", 1.0 if end == "expired" else None),))
        eventually(lambda: edge.worker.context.tables.tokens)
        with edge.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: app.test\r\n" + BEARER + b"\r\n\r\n")
            received = b""
            while not received.endswith(b"begin"):
                received += sock.recv(4096)
            if end == "revoked":
                edge.feed.remove(tokens=(API,))
            sock.settimeout(4)
            try:
                assert sock.recv(4096) == b""
            except ConnectionResetError:
                pass


def test_a_held_request_whose_token_ends_gets_a_problem(edge):
    edge.feed.add(agents=(agent_row("alice", None, "starting"),))
    eventually(lambda: edge.worker.context.tables.agents["alice"].state == "starting")
    with edge.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: app.test\r\n" + BEARER + b"\r\n\r\n")
        eventually(lambda: edge.worker.context.tables.agents["alice"].waiting)
        edge.feed.remove(tokens=(API,))
        edge.feed.add(agents=(agent_row("alice", edge.agent.endpoint),))
        try:
            assert not sock.recv(4096).startswith(b"HTTP/1.1 200")
        except ConnectionResetError:
            pass
    assert edge.agent.heads == []


def test_a_snapshot_without_a_token_ends_it(edge):
    edge.feed.stop()
    edge.feed.tokens.clear()
    edge.feed.start()
    eventually(lambda: not edge.worker.context.tables.tokens)
    problem(get(edge, BEARER), 401, "invalid-token")


def test_without_the_manager_for_long_the_reason_is_told():
    with Edge(feed_grace=0.1) as edge:
        edge.feed.add(tokens=(session_row(API, "alice", None),))
        eventually(lambda: edge.worker.context.tables.tokens)
        edge.feed.stop()
        eventually(lambda: not edge.worker.context.tables.tokens, 10)
        problem(get(edge, BEARER), 503, "manager-away")


def test_logs_name_the_tokens_id_and_never_the_token(tmp_path):
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with Edge(log_fd=fd) as edge:
        edge.feed.add(tokens=(session_row(API, "alice", None),))
        eventually(lambda: edge.worker.context.tables.tokens)
        get(edge, BEARER)
        get(edge, BEARER, path=f"/x?token={API}")
        get(edge, BEARER, BEARER)
        get(edge, b"Authorization: Bearer " + BOBS.encode())
        edge.do(edge.worker.context.log.flush)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    os.close(fd)
    sha256 = hashlib.sha256(API.encode()).hexdigest()
    assert [(line["status"], line["user"], line.get("token")) for line in lines] == [
        (200, "alice", sha256[:16]),
        (200, "alice", sha256[:16]),
        (400, None, None),
        (401, None, None),
    ]
    text = path.read_text()
    assert not any(secret in text for secret in (API, BOBS, sha256))


def subdomains(**more):
    return Edge(label="notes-1", routing="subdomain", public_url="https://example.org", **more)


def at(edge, host, *lines, **more):
    head = f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n".encode()
    return edge.ask(head + b"".join(line + b"\r\n" for line in lines) + b"\r\n", timeout=3)


def test_with_subdomains_the_host_chooses_among_the_users_own_apps():
    with subdomains() as edge:
        bob = Agent(echo)
        edge.feed.add(
            agents=(agent_row("bob", bob.endpoint, label="notes-2"),), tokens=(session_row(API, "alice", None),)
        )
        eventually(lambda: edge.worker.context.tables.tokens)
        assert at(edge, "notes-1.example.org", BEARER).startswith(b"HTTP/1.1 200")
        assert at(edge, "NOTES-1.EXAMPLE.ORG:8443", BEARER).startswith(b"HTTP/1.1 200")
        for host in ("notes-2.example.org", "notes-3.example.org", "example.org", "notes-1.evil.org", "x"):
            answer = at(edge, host, BEARER, *PAGE)
            assert answer.startswith(b"HTTP/1.1 404") and b"application/problem+json" in answer, (host, answer)
        assert len(edge.agent.heads) == 2 and bob.heads == []
        bob.close()


def test_with_subdomains_a_program_sends_no_origin():
    with subdomains() as edge:
        edge.feed.add(tokens=(session_row(API, "alice", None),))
        eventually(lambda: edge.worker.context.tables.tokens)
        head = b"POST / HTTP/1.1\r\nHost: notes-1.example.org\r\nConnection: close\r\nContent-Length: 2\r\n"
        assert edge.ask(head + BEARER + b"\r\n\r\nhi", timeout=3).startswith(b"HTTP/1.1 200")


def test_a_flood_of_guesses_does_not_keep_others_waiting(edge):
    socks = [edge.connect() for _ in range(20)]
    guess = b"GET / HTTP/1.1\r\nHost: app.test\r\nAuthorization: Bearer dsp_%043d\r\n\r\n"
    for number, sock in enumerate(socks):
        sock.sendall(b"".join(guess % (number * 100 + count) for count in range(100)))
    began = time.monotonic()
    assert get(edge, BEARER).status == 200
    assert time.monotonic() - began < 2
    assert edge.feed.of_type("lookup") == []
    for sock in socks:
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()
