"""Subdomain routing: a sign-in reaches an agent's own host for the person who asked, and for nobody else."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.portal_manager import Browser, Manager, Program, make

PORTAL = "https://apps.example"
HOST = "https://alice-2bd806c97f0e.apps.example"


@pytest.fixture
def portal():
    return make(Manager(), routing="subdomain", public_url=PORTAL)


class Person:
    """One browser that knows several hosts: the test client's cookies are kept apart by host."""

    def __init__(self, app):
        self.browser = Browser(app, PORTAL)

    def open(self, url: str, **headers):
        parts = urlsplit(url)
        self.browser.origin = f"{parts.scheme}://{parts.netloc}"
        return self.browser.get(parts.path + (f"?{parts.query}" if parts.query else ""), **headers)

    def sign_in(self, user: str = "alice", password: str = "correct horse", query: str = ""):
        page = self.open(f"{PORTAL}/auth/login{query}")
        return self.browser.submit(page, "/login", {"user": user, "password": password})

    def cookie(self, name: str, host: str):
        found = self.browser.client.get_cookie(f"__Host-{name}", domain=urlsplit(host).netloc)
        return found.value if found else None


def test_a_person_who_is_signed_in_gets_through_at_once(portal) -> None:
    app, manager = portal
    person = Person(app)
    person.sign_in()
    page = person.open(f"{HOST}/auth/login?next=/lab%3Fx")
    assert page.location.startswith(f"{PORTAL}/auth/handover?host=alice-2bd806c97f0e.apps.example&nonce=")
    nonce = person.cookie("dispatcher-nonce", HOST)
    assert nonce
    assert nonce not in page.location
    page = person.open(page.location)
    assert page.location.startswith(f"{HOST}/auth/handover/redeem?code=")
    page = person.open(page.location)
    assert (page.status, page.location) == (303, "/lab?x")
    token = person.cookie("dispatcher", HOST)
    assert token
    assert token != person.cookie("dispatcher", PORTAL)
    assert person.cookie("dispatcher-nonce", HOST) is None
    assert all("domain" not in line.lower() for line in page.headers.getlist("Set-Cookie"))
    assert [name for name, *_ in manager.calls].count("redeem") == 1


def test_a_person_who_is_not_signs_in_on_the_way(portal) -> None:
    app, _ = portal
    person = Person(app)
    page = person.open(f"{HOST}/auth/login?next=/lab")
    page = person.open(page.location)
    assert page.location.startswith("/auth/login?next=%2Fauth%2Fhandover%3Fhost")
    form = person.open(PORTAL + page.location)
    assert f"form-action 'self' {PORTAL} https://*.apps.example" in form.headers["Content-Security-Policy"]
    page = person.browser.submit(form, "/login", {"user": "alice", "password": "correct horse"})
    page = person.open(person.open(PORTAL + page.location).location)
    assert (page.status, page.location) == (303, "/lab")


def test_a_link_sent_to_another_person_is_not_valid(portal) -> None:
    app, manager = portal
    attacker, victim = Person(app), Person(app)
    attacker.sign_in("bob", "battery staple")
    victim.sign_in()
    # The attacker's own code, in the victim's browser: nobody is signed in as the attacker.
    begun = attacker.open(f"{HOST}/auth/login").location
    page = victim.open(attacker.open(begun).location)
    assert page.status == 403
    assert victim.cookie("dispatcher", HOST) is None
    # The attacker's hand-over, carried out by the victim's session: the code is bound to the attacker's nonce.
    code = victim.open(attacker.open(f"{HOST}/auth/login").location).location
    assert victim.open(code).status == 403
    victim.open(f"{HOST}/auth/login")
    code = victim.open(attacker.open(f"{HOST}/auth/login").location).location
    assert victim.open(code).status == 403
    assert victim.cookie("dispatcher", HOST) is None
    assert not any(row["user"] == "alice" and row.get("host") for row in manager.rows.values())


def test_a_code_is_for_one_host_and_once(portal) -> None:
    app, _ = portal
    person = Person(app)
    person.sign_in()
    page = person.open(person.open(f"{HOST}/auth/login").location)
    code = parse_qs(urlsplit(page.location).query)["code"][0]
    other = "https://bob-81b637d8fcd2.apps.example"
    person.open(f"{other}/auth/login")
    assert person.open(f"{other}/auth/handover/redeem?code={code}&next=/").status == 403
    page = person.open(page.location)
    assert page.status == 403
    assert "Sign-in not completed" in page.text
    assert 'href="/"' in page.source


def test_two_tabs_at_once_both_arrive(portal) -> None:
    app, _ = portal
    person = Person(app)
    person.sign_in()
    begun = [person.open(f"{HOST}/auth/login?next={path}").location for path in ("/a", "/b")]
    codes = [person.open(location).location for location in begun]
    assert [person.open(location).location for location in codes] == ["/a", "/b"]


@pytest.mark.parametrize(
    "query",
    [
        "host=evil.example&nonce=" + "0" * 64,
        "host=alice.apps.example.evil.example&nonce=" + "0" * 64,
        "host=evil.example/.apps.example&nonce=" + "0" * 64,
        "host=a@evil.example:1.apps.example&nonce=" + "0" * 64,
        "host=apps.example&nonce=" + "0" * 64,
        "host=alice.apps.example&nonce=short",
        "host=alice.apps.example",
        "",
    ],
)
def test_no_code_for_a_host_that_is_no_agents(portal, query: str) -> None:
    app, manager = portal
    person = Person(app)
    person.sign_in()
    page = person.open(f"{PORTAL}/auth/handover?{query}")
    assert page.status == 400
    assert not page.location
    assert not manager.codes


def test_targets_stay_on_the_agents_host(portal) -> None:
    app, _ = portal
    person = Person(app)
    person.sign_in()
    begun = person.open(f"{HOST}/auth/login?next=//evil.example").location
    assert parse_qs(urlsplit(begun).query)["next"] == ["/"]
    code = person.open(begun.replace("next=%2F", "next=%2F%2Fevil.example")).location
    assert parse_qs(urlsplit(code).query)["next"] == ["/"]
    assert person.open(code.replace("next=%2F", "next=%2F%2Fevil.example")).location == "/"


def test_the_account_lives_on_the_portals_host_alone(portal) -> None:
    app, manager = portal
    person = Person(app)
    person.sign_in()
    calls = len(manager.calls)
    for path in ("/auth/", "/auth/account", "/auth/logout"):
        assert person.open(HOST + path).location == PORTAL + path
    assert len(manager.calls) == calls
    assert person.open(f"{PORTAL}/auth/handover/redeem?code=x").status == 404
    assert person.open(f"{HOST}/auth/handover?host=alice.apps.example&nonce={'0' * 64}").status == 404


def test_a_form_of_one_host_is_refused_on_another(portal) -> None:
    app, manager = portal
    person = Person(app)
    person.sign_in()
    page = person.open(f"{PORTAL}/auth/account")
    answer = person.browser.submit(
        page, "/account/sessions", {"id": "all"}, Origin=HOST, Sec_Fetch_Site="same-site"
    )
    assert answer.status == 403
    assert len(manager.rows) == 1


def test_trying_again_works_on_the_agents_host(portal) -> None:
    app, manager = portal
    person = Person(app)
    person.sign_in()
    person.open(person.open(person.open(f"{HOST}/auth/login").location).location)
    manager.agents["alice"] |= {"state": "failed", "failure": None}
    page = person.open(f"{HOST}/auth/waiting", X_Dispatcher_Agent="alice", X_Dispatcher_Target="/lab")
    assert page.status == 503
    answer = person.browser.submit(page, "/agents", {"action": "start"})
    assert (answer.status, answer.location) == (303, "/lab")
    assert manager.calls[-1][-1] == "running"


def test_the_dashboard_links_to_each_apps_host(portal) -> None:
    app, _ = portal
    person = Person(app)
    person.sign_in()
    assert f'href="{HOST}/"' in person.open(f"{PORTAL}/auth/").source


def test_signing_out_leaves_other_hosts_cookies_alone(portal) -> None:
    app, _ = portal
    person = Person(app)
    person.browser.client.set_cookie("theirs", "x", domain="apps.example")
    person.sign_in()
    page = person.browser.submit(person.open(f"{PORTAL}/auth/logout"), "/logout")
    assert [line.partition("=")[0] for line in page.headers.getlist("Set-Cookie")] == ["__Host-dispatcher"]


def test_programs_are_told_where_to_sign_in(portal) -> None:
    app, _ = portal
    answer = Program(app, HOST).get("/auth/login", X_Forwarded_Host="alice-2bd806c97f0e.apps.example")
    assert (answer.status, answer.json["fix"]) == (401, f"sign in at {PORTAL}/auth/login")


def test_another_name_of_the_server_leads_to_the_portals(portal) -> None:
    app, manager = portal
    for host in ("http://127.0.0.1:8080", "https://example", "https://a.b.apps.example"):
        page = Person(app).open(f"{host}/auth/login?next=/x")
        assert (page.location, page.headers.getlist("Set-Cookie")) == (f"{PORTAL}/auth/login", [])
    assert not manager.calls


def test_in_session_routing_there_is_no_hand_over() -> None:
    app, _ = make()
    browser = Browser(app)
    browser.sign_in()
    assert browser.get(f"/auth/handover?host=alice.portal.test&nonce={'0' * 64}").status == 404
    assert browser.get("/auth/handover/redeem?code=x").status == 404
