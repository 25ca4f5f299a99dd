"""The portal's side of signing in at another site."""

from __future__ import annotations

import pytest

from dispatcher.plugin.errors import ManagerUnreachable
from dispatcher.proxy.portal import methods
from tests.support.portal_manager import Browser, Manager, Program, digest, make

CORP = {"name": "oidc.corp", "title": "Corp & <Co>"}


@pytest.fixture
def portal(monkeypatch):
    monkeypatch.setattr(methods, "FRESH", 0.0)
    app, manager = make(public_url="http://portal.test:8080")
    manager.passwords, manager.sites = False, [CORP]
    return app, manager


def start(browser, **query):
    page = browser.get("/auth/start/oidc.corp" + (f"?next={query['next']}" if query else ""))
    assert page.status == 303, page.text
    return page.location.partition("state=")[2]


def test_the_only_site_is_gone_to_at_once_but_not_after_signing_out(portal):
    app, manager = portal
    browser = Browser(app)
    page = browser.get("/auth/login?next=/lab")
    assert (page.status, page.location) == (303, "/auth/start/oidc.corp?next=%2Flab")
    for notice in ("signed-out", "everywhere"):
        page = browser.get(f"/auth/login?notice={notice}")
        assert page.status == 200 and "Sign in with Corp & <Co>" in page.text and "Password" not in page.text
    assert browser.get("/auth/signed-out").location == "/auth/login?notice=signed-out"
    manager.passwords = True
    page = browser.get("/auth/login")
    assert page.status == 200 and "Sign in with Corp & <Co>" in page.text and "Password" in page.text
    manager.passwords, manager.sites = False, [CORP, {"name": "oidc.lab", "title": "Lab"}]
    assert "Sign in with Lab" in browser.get("/auth/login").text


def test_who_is_signed_in_is_asked_first(portal):
    app, manager = portal
    browser = Browser(app)
    browser.get(f"/auth/callback/oidc.corp?state={start(browser)}&code=alice")
    page = browser.get("/auth/login")
    assert page.status == 200 and "You are signed in as alice" in page.text


def test_a_page_of_another_site_cannot_replace_a_session(portal):
    app, manager = portal
    browser = Browser(app)
    for site in ("cross-site", "same-site"):
        assert browser.get("/auth/start/oidc.corp", Sec_Fetch_Site=site).location.startswith(
            "https://login.example.org"
        )
    browser.get(f"/auth/callback/oidc.corp?state={start(browser)}&code=alice")
    for site in ("cross-site", "same-site"):
        page = browser.get("/auth/start/oidc.corp?next=/lab", Sec_Fetch_Site=site)
        assert page.location == "/auth/login?next=%2Flab"
    for site in ("same-origin", "none", None):
        assert browser.get("/auth/start/oidc.corp", Sec_Fetch_Site=site).location.startswith(
            "https://login.example.org"
        )


def test_a_sign_in_and_its_cookies(portal):
    app, manager = portal
    browser = Browser(app)
    state = start(browser, next="/lab%3Fx=1")
    nonce = browser.cookie("dispatcher-signin")
    assert manager.calls[-1] == ("begin_sign_in", "oidc.corp", digest(nonce), "192.0.2.7", "/lab?x=1")
    page = browser.get(f"/auth/callback/oidc.corp?state={state}&code=alice", Sec_Fetch_Site="cross-site")
    assert (page.status, page.location) == (303, "/lab?x=1")
    assert digest(browser.cookie()) in manager.rows
    for value in page.headers.getlist("Set-Cookie"):
        assert "HttpOnly" in value and "SameSite=Lax" in value and "Path=/;" in value


def test_two_tabs_begin_and_both_end_well(portal):
    app, manager = portal
    browser = Browser(app)
    first, second = start(browser, next="/one"), start(browser, next="/two")
    for state, target in ((first, "/one"), (second, "/two")):
        assert browser.get(f"/auth/callback/oidc.corp?state={state}&code=alice").location == target
    assert len(manager.rows) == 1  # the earlier session has ended


def test_the_cookie_of_another_browser_does_not_do(portal):
    app, manager = portal
    attacker, victim = Browser(app), Browser(app)
    state = start(attacker)
    for prepare in (lambda: None, lambda: start(victim), lambda: victim.set_cookie("dispatcher-signin", "x" * 43)):
        prepare()
        page = victim.get(f"/auth/callback/oidc.corp?state={state}&code=bob")
        assert page.status == 403 and "Not signed in" in page.text
        assert not manager.rows and not victim.cookie()


@pytest.mark.parametrize(
    "query",
    [
        "state=S&state=S&code=alice",
        "state=S&code=alice&code=bob",
        "&".join(f"a{n}=1" for n in range(30)),
        "state=" + "x" * 9000,
    ],
)
def test_an_answer_with_too_much_is_refused(portal, query):
    app, manager = portal
    browser = Browser(app)
    query = query.replace("S", start(browser))
    page = browser.get(f"/auth/callback/oidc.corp?{query}")
    assert page.status == 400 and "start again" in page.text.lower()
    assert not manager.rows


@pytest.mark.parametrize("path", ["/auth/start/oidc.corp", "/auth/callback/oidc.corp?state=x&code=y"])
@pytest.mark.parametrize("place", ["iframe", "empty", "script", "image", "object"])
def test_scripts_and_frames_get_nothing(portal, path, place):
    app, manager = portal
    assert Browser(app).get(path, Sec_Fetch_Dest=place).status == 403
    assert {name for name, *_ in manager.calls} <= {"sign_in_methods"}


def test_a_site_that_is_down_is_told_and_never_tried_again_by_itself(portal):
    app, manager = portal
    browser = Browser(app)
    state = start(browser, next="/lab")
    manager.site_down = True
    for path in ("/auth/start/oidc.corp?next=/lab", f"/auth/callback/oidc.corp?state={state}&code=alice"):
        page = browser.get(path)
        assert page.status == 503 and "not possible at the moment" in page.text
        assert 'href="/auth/start/oidc.corp?next=%2Flab"' in page.source and "http-equiv" not in page.source
        assert browser.get(path, Accept="application/json").json["status"] in {403, 503}


def test_who_is_refused_reads_why(portal):
    app, manager = portal
    browser = Browser(app)
    page = browser.get(f"/auth/callback/oidc.corp?state={start(browser, next='/lab')}&code=mallory")
    assert page.status == 403 and "Corp did not sign you in" in page.text and "next=%2Flab" in page.source


def test_another_name_of_the_portal_leads_to_the_public_one_first(portal):
    app, manager = portal
    page = Browser(app, "http://inner.test:8080").get("/auth/start/oidc.corp?next=/lab")
    assert page.location == "http://portal.test:8080/auth/start/oidc.corp?next=%2Flab"
    assert not [call for call in manager.calls if call[0] == "begin_sign_in"]


def test_no_site_of_this_name(portal):
    app, _ = portal
    assert Browser(app).get("/auth/start/oidc.other").status == 404
    for name in ("oidc.other", "local"):
        assert Browser(app).get(f"/auth/callback/{name}?state=x").status in {403, 404}


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "https://evil.example",
        "/auth/start/oidc.corp",
        "/auth/start%2Foidc.corp",
        "/auth/callback/x",
        "/auth/login",
        "/auth/signed-out",
        "/x" * 5000,
    ],
)
def test_targets_that_lead_elsewhere_or_round_in_circles(portal, target):
    app, _ = portal
    browser = Browser(app)
    state = start(browser, next=target.replace("&", "%26"))
    assert browser.get(f"/auth/callback/oidc.corp?state={state}&code=alice").location == "/"


def test_another_person_replaces_the_pages_of_the_first(portal):
    app, _ = portal
    browser = Browser(app)
    browser.get(f"/auth/callback/oidc.corp?state={start(browser)}&code=alice")
    page = browser.get(f"/auth/callback/oidc.corp?state={start(browser)}&code=bob")
    assert page.location.startswith("/auth/welcome?") and not browser.cookie()
    page = browser.submit(browser.get(page.location), "/welcome")
    assert page.status == 303 and browser.cookie()


def test_signing_out_leads_to_the_site_without_a_redirect(portal):
    app, manager = portal
    manager.sign_out_url = 'https://login.example.org/end?hint=a&b="><script>'
    browser = Browser(app)
    browser.get(f"/auth/callback/oidc.corp?state={start(browser)}&code=alice")
    page = browser.submit(browser.get("/auth/logout"), "/logout")
    assert page.status == 200 and not browser.cookie()
    assert '0; url=https://login.example.org/end?hint=a&amp;b=&#34;&gt;&lt;script&gt;"' in page.source
    assert "storage" in page.headers["Clear-Site-Data"]


def test_programs(portal):
    app, manager = portal
    program = Program(app)
    found = program.get("/auth/login").json
    assert found == {"sign_in": None, "sites": [{"title": CORP["title"], "url": "/auth/start/oidc.corp"}]}
    for body, status in (({"logout_token": "right"}, 200), ({"logout_token": "wrong"}, 400), ({}, 400)):
        answer = app.test_client().post("/auth/backchannel/oidc.corp", data=body)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (status, "no-store")
    assert app.test_client().get("/auth/backchannel/oidc.corp").status_code == 405


def test_the_form_is_there_while_the_manager_is_down():
    class Away(Manager):
        def sign_in_methods(self):
            raise ManagerUnreachable("The manager does not answer")

    app, _ = make(Away())
    assert "Password" in Browser(app).get("/auth/login").text


def test_the_ways_are_asked_for_now_and_then_only(monkeypatch):
    app, manager = make()
    for _ in range(20):
        Browser(app).get("/auth/login")
    assert len([call for call in manager.calls if call[0] == "sign_in_methods"]) == 1


def test_hosts_of_apps_have_none_of_these_pages():
    app, manager = make(public_url="http://portal.test:8080", routing="subdomain")
    manager.sites = [CORP]
    browser = Browser(app, "http://alice.portal.test:8080")
    for path in ("/auth/start/oidc.corp", "/auth/callback/oidc.corp?state=x&code=y"):
        assert browser.get(path).status == 404
    assert browser.post("/auth/backchannel/oidc.corp", {"logout_token": "right"}).status == 404
