"""Routing by subdomain: an origin of its own for each agent, sessions bound to one host, Origin checks."""

from __future__ import annotations

import pytest

from tests.support.edge_feed import agent_row, session_row
from tests.support.edge_harness import BOB, TOKEN, Agent, Edge, echo, eventually, saying

PARENT = "token-of-parent-0123456789abcdefghijklmnop"


def cookie(token: str) -> bytes:
    return b"Cookie: dispatcher=" + token.encode() + b"\r\n"


@pytest.fixture(scope="module")
def edge():
    with Edge(
        routing="subdomain",
        public_url="http://apps.localhost:8080",
        label="alice-1",
        host="alice-1.apps.localhost:8080",
    ) as edge:
        bobs = Agent(echo)
        edge.feed.add(
            agents=(agent_row("bob", bobs.endpoint, label="bob-2"),),
            sessions=(session_row(BOB, "bob", host="bob-2.apps.localhost:8080"), session_row(PARENT, "alice")),
        )
        eventually(lambda: len(edge.worker.context.tables.sessions) == 3)
        edge.bobs = bobs
        yield edge
        bobs.close()


def get(edge: Edge, host: str, token: str = TOKEN, *lines: bytes, path: str = "/", method: str = "GET"):
    from tests.support.edge_harness import read_answer

    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n".encode()
        + cookie(token)
        + b"".join(line + b"\r\n" for line in lines)
    )
    with edge.connect() as sock:
        sock.sendall(head + b"\r\n")
        return read_answer(sock, method)


ALICE, BOBS, MAIN = "alice-1.apps.localhost:8080", "bob-2.apps.localhost:8080", "apps.localhost:8080"
NAVIGATE = b"Sec-Fetch-Mode: navigate"


def test_each_host_reaches_its_agent(edge):
    answer = get(edge, ALICE)
    assert answer.status == 200 and b"\r\nHost: alice-1.apps.localhost:8080\r\n" in answer.body
    assert get(edge, ALICE.upper()).status == 200
    assert b"X-Dispatcher-User: bob" in get(edge, BOBS, BOB).body


def test_a_dot_at_the_end_of_a_host_leads_to_the_host_without_it(edge):
    edge.agent.heads.clear()
    answer = get(edge, "alice-1.apps.localhost.:8080", TOKEN, NAVIGATE, path="/x?y")
    assert (answer.status, answer.field(b"location")) == (308, b"http://alice-1.apps.localhost:8080/x?y")
    assert not edge.agent.heads


def test_a_session_of_one_host_opens_no_other(edge):
    edge.agent.heads.clear()
    edge.bobs.heads.clear()
    for host, token in (
        (BOBS, TOKEN),
        (ALICE, BOB),
        (ALICE, PARENT),
        (BOBS, PARENT),
        ("nobody-3.apps.localhost:8080", TOKEN),
        ("evil.test", TOKEN),
        ("alice-1.apps.localhost.evil.test:8080", TOKEN),
        ("x.alice-1.apps.localhost:8080", TOKEN),
        ("alice-1.apps.localhost:9", TOKEN),
    ):
        answer = get(edge, host, token, NAVIGATE)
        assert answer.status == 303 and answer.field(b"location") == b"/auth/login?next=/", (host, answer.status)
        assert get(edge, host, token).status == 401
    assert not edge.agent.heads and not edge.bobs.heads


def test_the_main_host_is_the_portals(edge):
    answer = get(edge, MAIN, PARENT, NAVIGATE)
    assert answer.status == 303 and answer.field(b"location") == b"/auth/"
    for host in (MAIN, ALICE):
        assert get(edge, host, PARENT, path="/auth/login").body.startswith(
            b"GET /auth/login HTTP/1.1\r\nHost: " + host.encode()
        )


ORIGIN = b"Origin: http://alice-1.apps.localhost:8080"


@pytest.mark.parametrize("lines,status", [
    ((ORIGIN,), 200), ((b"Origin: HTTP://ALICE-1.apps.localhost:8080",), 200), ((b"Sec-Fetch-Site: same-origin",), 200),
    ((), 403), ((b"Origin: null",), 403), ((b"Origin: http://bob-2.apps.localhost:8080",), 403), ((b"Origin: http://apps.localhost:8080",), 403),
    ((b"Origin: https://alice-1.apps.localhost:8080",), 403), ((b"Origin: http://alice-1.apps.localhost",), 403),
    ((b"Sec-Fetch-Site: same-site",), 403), ((ORIGIN, ORIGIN), 403),
    ((b"Origin: http://bob-2.apps.localhost:8080", b"Sec-Fetch-Site: same-origin"), 403),
])  # fmt: skip
def test_changes_and_upgrades_need_the_own_origin(edge, lines, status):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert get(edge, ALICE, TOKEN, *lines, method=method).status == status
    assert get(edge, ALICE, TOKEN, b"Connection: Upgrade", b"Upgrade: websocket", *lines).status == status
    assert get(edge, ALICE, TOKEN, *lines).status == 200, "reading is not checked"


def test_a_service_worker_is_the_agents_own_matter(edge):
    assert get(edge, ALICE, TOKEN, b"Service-Worker: script", path="/sw.js").status == 200


def test_no_cookie_for_a_sibling():
    answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Domain=apps.localhost; Path=/\r\nSet-Cookie: dispatcher=evil; Domain=apps.localhost\r\nContent-Length: 0\r\n\r\n"
    with Edge(
        saying(answer), routing="subdomain", public_url="http://apps.localhost:8080", label="alice-1", host=ALICE
    ) as edge:
        got = get(edge, ALICE)
        assert [value for name, value in got.fields if name == b"set-cookie"] == [b"a=1; Path=/"]


def test_a_childs_session_is_worth_nothing_where_agents_share_an_origin():
    with Edge(host=ALICE) as edge:
        assert get(edge, ALICE).status == 401


def test_a_shared_cache_keeps_no_answer_of_an_agent():
    """A request without a session would get it from the cache."""
    fields = b"Cache-Control: public, max-age=600\r\nCDN-Cache-Control: max-age=600\r\nX-Accel-Expires: 600\r\n"
    fields += b"CF-Edge-Cache: cache\r\nExpires: Wed, 21 Oct 2099 07:28:00 GMT\r\n"
    answer = saying(b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 5\r\n\r\nhello")
    with Edge(
        answer,
        routing="subdomain",
        public_url="http://apps.localhost:8080",
        label="alice-1",
        host=ALICE,
    ) as edge:
        found = get(edge, ALICE)
    assert found.status == 200 and found.field(b"cache-control") == b"private, max-age=600"
    assert not found.field(b"cdn-cache-control") and not found.field(b"x-accel-expires")
    assert not found.field(b"cf-edge-cache") and not found.field(b"expires")
