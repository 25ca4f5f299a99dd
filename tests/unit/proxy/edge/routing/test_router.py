"""The router's decisions, from values alone."""

from __future__ import annotations

import pytest

from dispatcher.config.load import parse
from dispatcher.proxy.edge.http.request import Request, parse_request
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.actions import (
    PORTAL,
    Decision,
    Events,
    Hold,
    Lookup,
    Page,
    Pass,
    Redirect,
    Refuse,
    Wake,
)
from dispatcher.proxy.edge.routing.router import Router
from dispatcher.proxy.edge.routing.settings import MAX_HELD, Settings
from dispatcher.proxy.edge.routing.table import Agent, Session, Tables
from tests.support.edge_feed import agent_row, session_row

NOT_SIGNED_IN = pages.not_signed_in("/auth/login")
TOKEN = "token-of-alice-0123456789abcdefghijklmnopqr"
NAVIGATION = b"Accept: text/html\r\nSec-Fetch-Mode: navigate\r\n"


class Rules:
    """A router over one agent of alice's."""

    def __init__(self, state: str = "running", **proxy: object) -> None:
        settings = Settings(parse({"proxy": proxy}))
        self.tables = Tables()
        rows = {
            "agents": [agent_row("alice", "tcp:127.0.0.1:9", state)],
            "sessions": [session_row(TOKEN, "alice")],
        }
        self.tables.apply({"type": "change", **rows}, 0.0)
        self.agent: Agent = self.tables.agents["alice"]
        (self.session,) = self.tables.sessions.values()
        self.router = Router(settings, self.tables)

    def route(
        self, target: str = "/", lines: bytes = b"", *, session: Session | None = None, digest: bytes = b""
    ) -> Decision:
        return self.router.route(request(target, lines), session, 1.0, b"http", digest)


def request(target: str = "/", lines: bytes = b"") -> Request:
    return parse_request(f"GET {target} HTTP/1.1\r\nHost: a\r\n".encode() + lines + b"\r\n", 100)


def test_a_session_leads_to_its_agent_and_counts_as_use():
    rules = Rules()
    assert rules.route(session=rules.session) == Pass(rules.agent, poll=False)
    assert rules.agent.traffic.use == 1 and rules.router.used == [rules.session]


@pytest.mark.parametrize("routing", ["session", "subdomain"])
def test_a_session_of_a_removed_user_opens_nothing_of_the_next_one_of_that_name(routing):
    subdomain = {"routing": routing, "public_url": "https://example.org"} if routing == "subdomain" else {}
    rules = Rules(**subdomain)
    host = "l.example.org"
    rows = {"sessions": [session_row(TOKEN, "alice", **({"host": host} if subdomain else {}))]}
    agent = agent_row("alice", "tcp:127.0.0.1:9", label="l")
    rules.tables.apply({"type": "change", "agents": [agent], **rows}, 0.0)
    asked = parse_request(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host.encode(), 100)
    assert isinstance(rules.router.route(asked, rules.session, 1.0, b"https", b""), Pass)
    rules.tables.apply({"type": "change", "agents": [{**agent, "user_id": agent["user_id"] + 1}]}, 0.0)
    assert rules.router.route(asked, rules.session, 1.0, b"https", b"") == Refuse(pages.NO_AGENT)
    assert rules.route("/auth/events?agent=alice", session=rules.session) == Refuse(pages.NO_AGENT)


@pytest.mark.parametrize("target", ["/auth", "/auth/login", "/auth?x"])
def test_the_portals_paths_need_no_session(target):
    assert Rules().route(target) is PORTAL


def test_without_a_session_people_sign_in_and_programs_get_401():
    rules = Rules()
    assert rules.route("/a?b", NAVIGATION) == Redirect(b"/auth/login?next=/a%3Fb")
    assert rules.route() == Refuse(NOT_SIGNED_IN)
    assert rules.route(digest=b"d") == Lookup(b"d", Refuse(NOT_SIGNED_IN))


@pytest.mark.parametrize(
    ("proxy", "login"),
    [
        ({}, "/auth/login"),
        ({"prefix": "/enter"}, "/enter/login"),
        ({"public_url": "https://example.org"}, "/auth/login"),
        ({"public_url": "https://example.org", "routing": "subdomain"}, "https://example.org/auth/login"),
    ],
)
def test_a_program_without_a_session_is_told_where_to_sign_in(proxy, login):
    refused = Rules(**proxy).route()
    assert isinstance(refused, Refuse) and refused.failure.status == 401
    assert f"Sign in at {login}," in refused.failure.fix
    assert refused.failure.extra == {"login": login}


@pytest.mark.parametrize(
    ("host", "canonical"),
    [
        (b"example.org.", b"https://example.org"),
        (b"Example.ORG.:8443", b"https://example.org:8443"),
        (b"l.example.org.", b"https://l.example.org"),
        (b"evil.test.", None),
        (b"evilexample.org.", None),
    ],
)
def test_a_host_with_a_dot_at_the_end_is_the_same_host(host, canonical):
    """To a browser it is another one, which has no cookies."""
    both = {
        routing: Rules(routing=routing, public_url="https://example.org") for routing in ("session", "subdomain")
    }
    for routing, rules in both.items():
        for target in (b"/a?b", b"/auth/login"):
            asked = parse_request(b"POST %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host), 100)
            found = rules.router.route(asked, rules.session, 1.0, b"https", b"")
            if canonical is None or (routing, host) == ("session", b"l.example.org."):
                assert not isinstance(found, Redirect)
            else:
                assert found == Redirect(canonical + target, 308)


@pytest.mark.parametrize("name", [b"dispatcher", b"__Host-dispatcher"])
def test_the_cache_of_an_agents_host_is_cleared_once_its_session_has_ended(name):
    rules = Rules(routing="subdomain", public_url="https://example.org")
    cookie = b"Cookie: a=b; " + name + b"=x\r\n"
    first, ended = rules.route("/", NAVIGATION), rules.route("/", NAVIGATION + cookie)
    assert isinstance(first, Redirect) and isinstance(ended, Redirect)
    assert ended.location == first.location
    assert (first.lines, ended.lines) == (b"", b'Clear-Site-Data: "cache"\r\n')
    shared = Rules().route("/", NAVIGATION + cookie)
    assert isinstance(shared, Redirect) and not shared.lines, "there the sign-out and the sign-in do"


SAME = b"Origin: https://a\r\n"


@pytest.mark.parametrize(
    ("lines", "good"),
    [
        (SAME, True),
        (b"Origin: https://a:443\r\n", True),
        (b"Origin: https://apps.test:8443\r\n", True),  # public_url
        (b"", True),  # a program
        (b"Sec-Fetch-Site: same-origin\r\n", True),
        (b"Origin: null\r\nSec-Fetch-Site: same-origin\r\n", True),  # a page with no-referrer
        (b"Sec-Fetch-Site: none\r\n", True),
        (b"Origin: null\r\n", False),
        (b"Origin: https://evil.test\r\n", False),
        (b"Origin: http://a\r\n", False),
        (b"Origin: https://a:8443\r\n", False),
        (b"Sec-Fetch-Site: cross-site\r\n", False),
        (b"Sec-Fetch-Site: same-site\r\n", False),
        (b"Origin: null\r\nSec-Fetch-Site: cross-site\r\n", False),
    ],
)
def test_one_rule_for_the_origin_of_changes_and_websockets(lines, good):
    rules = Rules(public_url="https://apps.test:8443")
    for host in (b"a", b"a:443"):
        for start, more in (
            (b"POST", b"Content-Length: 0\r\n"),
            (b"DELETE", b""),
            (b"GET", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
        ):
            head = start + b" / HTTP/1.1\r\nHost: " + host + b"\r\n" + more + lines + b"\r\n"
            decision = rules.router.route(parse_request(head, 100), rules.session, 1.0, b"https", b"")
            assert isinstance(decision, Pass) == good, (head, decision)
            if not good:
                assert isinstance(decision, Refuse) and decision.failure.status == 403
    assert isinstance(rules.route("/", lines, session=rules.session), Pass), "reading is not checked"


def test_a_refusal_names_what_the_front_proxy_should_send():
    rules = Rules()
    head = (
        b"POST / HTTP/1.1\r\nHost: inner:8080\r\nOrigin: https://apps.test\r\nSec-Fetch-Site: same-origin\r\n\r\n"
    )
    decision = rules.router.route(parse_request(head, 100), rules.session, 1.0, b"http", b"")
    assert isinstance(decision, Refuse)
    assert "X-Forwarded-Proto: https and X-Forwarded-Host: apps.test" in decision.failure.fix


@pytest.mark.parametrize(
    ("origin", "fix"),
    [
        (b"https://apps.test", "X-Forwarded-Host: apps.test and X-Forwarded-Port: 443 and list it"),
        (b"http://apps.test", "X-Forwarded-Proto: http, X-Forwarded-Host: apps.test and X-Forwarded-Port: 80 and"),
        (b"https://apps.test:8443", "send X-Forwarded-Host: apps.test:8443 and list it"),
    ],
)
def test_a_refusal_names_the_port_of_a_front_proxy(origin, fix):
    rules = Rules()
    head = b"POST / HTTP/1.1\r\nHost: apps.test:8080\r\nOrigin: " + origin + b"\r\n\r\n"
    decision = rules.router.route(parse_request(head, 100), rules.session, 1.0, b"https", b"")
    assert isinstance(decision, Refuse)
    assert fix in decision.failure.fix


def test_an_origin_with_an_impossible_port_is_refused():
    rules = Rules()
    head = b"POST / HTTP/1.1\r\nHost: a\r\nOrigin: https://a:99999\r\nSec-Fetch-Site: same-origin\r\n\r\n"
    assert isinstance(rules.router.route(parse_request(head, 100), rules.session, 1.0, b"http", b""), Refuse)


def test_a_sleeping_agent_is_woken_and_the_request_held():
    rules = Rules("asleep", hold=7)
    assert rules.route(session=rules.session) == Wake(rules.agent, Hold(rules.agent, 7))
    for number in range(MAX_HELD):
        rules.agent.waiting[number] = None
    decision = rules.route("/other", NAVIGATION, session=rules.session)
    assert isinstance(decision, Wake) and isinstance(decision.then, Page)
    assert decision.then.request.target == b"/auth/waiting"


def test_a_failed_agent_is_neither_woken_nor_waited_for():
    rules = Rules("failed")
    decision = rules.route(session=rules.session)
    assert isinstance(decision, Refuse) and decision.failure.code == "agent-failed"


def test_events_are_the_owners_alone():
    rules = Rules()
    assert rules.route("/auth/events", session=rules.session) == Events(rules.agent)
    assert rules.route("/auth/events?agent=bob", session=rules.session) == Refuse(pages.NO_AGENT)
    assert rules.route("/auth/events") == Refuse(NOT_SIGNED_IN)


def test_what_becomes_of_a_held_request():
    rules = Rules("starting")
    router, agent, held = rules.router, rules.agent, request()
    assert router.changed(held, rules.session, agent, poll=False) == Hold(agent, 0)
    agent.update(agent_row("alice", "tcp:127.0.0.1:9"))
    assert router.changed(held, rules.session, agent, poll=False) == Pass(agent, poll=False)
    assert router.waited(held, agent, paused=False) == Refuse(pages.UNREACHABLE)
    assert router.waited(held, agent, paused=True) == Refuse(pages.GONE_AWAY)
    rules.session.gone = True
    assert router.changed(held, rules.session, agent, poll=False) == Refuse(NOT_SIGNED_IN)


def test_a_request_is_held_once_for_an_agent_that_cannot_be_reached():
    rules = Rules(hold=7)
    assert rules.router.unreachable(rules.agent, held=False) == Hold(rules.agent, 7)
    assert rules.router.unreachable(rules.agent, held=True) == Refuse(pages.UNREACHABLE)
    assert rules.router.dropped(rules.agent, held=True) == Refuse(pages.GONE_AWAY)
