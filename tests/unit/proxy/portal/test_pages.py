"""The portal's pages as people and programs meet them, with a manager in memory."""

from __future__ import annotations

import re

import pytest

from dispatcher.common import log
from dispatcher.proxy.portal.responses import qualities
from tests.support.portal_manager import Browser, Program, agent, digest, make

LOG = ["Traceback (most recent call last):", "ModuleNotFoundError: No module named 'numpy'"]
FAILURE = {"what": "exit code 1", "why": "cannot read /etc/secrets/token", "fix": "install numpy", "log": LOG}


@pytest.fixture
def portal():
    return make()


class TestWaiting:
    def page(self, app, manager, browser=None, **state):
        browser = browser or Browser(app)
        if browser.cookie() is None:
            browser.sign_in()
        manager.agents["alice"] |= state
        return browser.get("/auth/waiting", X_Dispatcher_Agent="alice", X_Dispatcher_Target="/lab?x=1")

    def test_it_shows_the_stage_and_works_without_scripts(self, portal) -> None:
        app, manager = portal
        page = self.page(app, manager, state="starting", stage="booting", detail="waiting for the network")
        assert (page.status, page.headers["Retry-After"]) == (503, "2")
        assert page.headers["Cache-Control"] == "no-store"
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "Notebook booting" in page.text.replace("This page opens the app as soon as it is ready. ", "")
        assert "waiting for the network" in page.text
        assert '<noscript><meta http-equiv="refresh" content="2; url=/lab?x=1"></noscript>' in page.source
        assert 'data-events="/auth/events"' in page.source
        assert 'data-target="/lab?x=1"' in page.source

    def test_progress_is_shown_when_it_is_known(self, portal) -> None:
        app, manager = portal
        assert 'value="0.25"' in self.page(app, manager, state="starting", fraction=0.25).source
        assert (
            "value=" not in self.page(app, manager, state="starting", fraction=None).source.split("<progress")[1]
        )

    def test_programs_get_a_problem(self, portal) -> None:
        app, manager = portal
        program = Program(app)
        program.post("/auth/login", {"user": "alice", "password": "correct horse"})
        manager.agents["alice"] |= {"state": "starting", "stage": "booting"}
        for accept in ("application/json", "*/*", "image/png"):
            answer = program.get("/auth/waiting", X_Dispatcher_Agent="alice", Accept=accept)
            assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
            assert answer.response.mimetype == "application/problem+json"
            assert answer.headers["Cache-Control"] == "no-store"
            assert (answer.json["code"], answer.json["agent"]["stage"]) == ("unavailable", "booting")

    def test_a_failed_start_says_so_and_tells_operators_alone_why(self, portal, capsys) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        manager.agents["alice"] |= {"state": "failed", "failure": FAILURE}
        page = browser.get(
            "/auth/waiting", X_Dispatcher_Agent="alice", X_Dispatcher_Target="/lab?x=1", X_Request_ID="r-17"
        )
        assert page.status == 503
        assert "Notebook could not start" in page.text
        assert "Try again, or tell your administrator (request ID r-17)." in page.text
        for text in ("/etc/secrets", "exit code", "numpy"):
            assert text not in page.source.lower()
        log = capsys.readouterr().out
        for text in ("r-17", "alice", "cannot read /etc/secrets/token", "install numpy"):
            assert text in log
        assert 'http-equiv="refresh"' not in page.source
        answer = browser.submit(page, "/agents", {"action": "start"})
        assert (answer.status, answer.location) == (303, "/lab?x=1")
        assert manager.calls[-1][0::2][:2] == ("my_state", "alice")
        assert manager.calls[-1][-1] == "running"

    def test_a_failure_without_details_is_still_a_page(self, portal) -> None:
        app, manager = portal
        assert "Notebook could not start" in self.page(app, manager, state="failed", failure=None).text

    def test_programs_get_a_failure_as_a_problem(self, portal) -> None:
        app, manager = portal
        program = Program(app)
        program.post("/auth/login", {"user": "alice", "password": "correct horse"})
        manager.agents["alice"] |= {"state": "failed", "failure": FAILURE}
        answer = program.get("/auth/waiting", X_Dispatcher_Agent="alice")
        assert (answer.status, answer.json["code"]) == (503, "start-failed")
        assert answer.json["title"] == "Notebook could not start"
        assert answer.json["fix"] == "try again, or tell your administrator"
        assert (answer.json["status"], answer.json["agent"]["state"]) == (503, "failed")
        assert "secret" not in answer.source

    @pytest.mark.parametrize("state", ["suspended", "hibernated", "stopped"])
    def test_an_app_that_sleeps_can_be_woken_with_a_button(self, portal, state: str) -> None:
        """A browser without fetch metadata looks like a poll, which wakes nothing."""
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        page = self.page(app, manager, browser, state=state)
        answer = browser.submit(page, "/agents", {"action": "start"})
        assert (answer.status, answer.location) == (303, "/lab?x=1")
        assert manager.calls[-1][-1] == "running"
        manager.agents["alice"]["state"] = state
        assert "Start Notebook" in browser.get("/auth/").text

    def test_without_the_edges_headers_it_is_about_the_sessions_agent(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        manager.agents["alice"] |= {"state": "starting"}
        page = browser.get("/auth/waiting?next=//evil")
        assert page.status == 503
        assert 'data-target="/"' in page.source

    def test_without_a_session_it_leads_to_the_form(self, portal) -> None:
        app, _ = portal
        page = Browser(app).get("/auth/waiting", X_Dispatcher_Agent="alice", X_Dispatcher_Target="/lab")
        assert (page.status, page.location) == (303, "/auth/login?next=%2Flab")
        assert Program(app).get("/auth/waiting", X_Dispatcher_Agent="alice").status == 401

    def test_a_name_beyond_ascii(self, portal) -> None:
        app, manager = portal
        manager.users["zoë"] = "correct horse"
        manager.agents["zoë"] = agent("zoë", "starting", stage="booting")
        browser = Browser(app)
        browser.sign_in("zoë")
        header = "zoë".encode().decode("latin-1")
        page = browser.get("/auth/waiting", X_Dispatcher_Agent=header, X_Dispatcher_Target="/")
        assert page.status == 503
        assert 'data-agent="zoë"' in page.source

    def test_it_waits_for_the_manager_too(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        manager.down = True
        page = browser.get("/auth/waiting", X_Dispatcher_Agent="alice", X_Dispatcher_Target="/")
        assert page.status == 503
        assert "does not answer" in page.text


class TestDashboard:
    def test_it_lists_ones_own_apps_alone(self, portal) -> None:
        app, manager = portal
        manager.agents["alice:lab"] = agent("alice:lab", "suspended")
        browser = Browser(app)
        browser.sign_in()
        page = browser.get("/auth/")
        assert page.status == 200
        assert "Notebook Running" in page.text
        assert "lab Asleep" in page.text
        assert "Never used" in page.text
        assert "Data" not in page.text, "unknown"
        assert "bob" not in page.text

    def test_it_shows_what_the_data_takes(self, portal) -> None:
        app, manager = portal
        manager.agents["alice"]["disk"] = {"used": 1288490189, "limit": 5 << 30, "full": False}
        manager.agents["alice:lab"] = agent("alice:lab", disk={"used": 64 << 20, "limit": 64 << 20, "full": True})
        browser = Browser(app)
        browser.sign_in()
        page = browser.get("/auth/")
        assert "Data: 1.2 GiB of 5.0 GiB" in page.text
        assert "Data: 64.0 MiB of 64.0 MiB, full: delete files to go on" in page.text

    def test_opening_another_app_is_asked_first_and_clears_the_cache(self, portal) -> None:
        app, manager = portal
        manager.agents["alice:lab"] = agent("alice:lab", "suspended")
        browser = Browser(app)
        browser.sign_in()
        page = browser.submit(browser.get("/auth/"), "/agents", {"agent": "alice:lab", "action": "open"})
        assert page.status == 200
        assert "Open lab? Save your work in the open pages of Notebook first." in page.text
        assert "Close the open pages of Notebook in this browser" in page.text
        assert manager.rows[digest(browser.cookie())]["agent"] == "alice"
        answer = browser.submit(page, "/agents")
        assert (answer.status, answer.location) == (303, "/")
        assert answer.headers["Clear-Site-Data"] == '"cache"'
        assert manager.rows[digest(browser.cookie())]["agent"] == "alice:lab"

    def test_nothing_is_asked_without_another_app_before_or_by_programs(self, portal) -> None:
        app, manager = portal
        manager.agents["alice:lab"] = agent("alice:lab", "suspended")
        browser, program = Browser(app), Program(app)
        browser.sign_in()
        fields = browser.get("/auth/").form("/agents")["fields"]
        assert browser.post("/auth/agents", fields | {"agent": "alice", "action": "open"}).status == 303
        del manager.agents["alice"]
        assert browser.post("/auth/agents", fields | {"agent": "alice:lab", "action": "open"}).status == 303
        program.post("/auth/login", {"user": "alice", "password": "correct horse"})
        assert program.post("/auth/agents", {"agent": "alice:lab", "action": "open"}).status == 200

    @pytest.mark.parametrize(
        ("action", "asked"), [("start", "running"), ("stop", "stopped"), ("restart", "restart")]
    )
    def test_actions(self, portal, action: str, asked: str) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        answer = browser.submit(browser.get("/auth/"), "/agents", {"action": action})
        assert (answer.status, answer.location) == (303, "/auth/")
        assert manager.calls[-1] == ("my_state", digest(browser.cookie()), "alice", asked)

    def test_an_unknown_action_changes_nothing(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        page = browser.submit(browser.get("/auth/"), "/agents", {"action": "admin"})
        assert page.status == 400
        assert not any(call[0] in {"my_state", "select"} for call in manager.calls)

    def test_a_failure_is_shown(self, portal) -> None:
        app, manager = portal
        manager.agents["alice"] |= {"state": "failed", "failure": FAILURE}
        browser = Browser(app)
        browser.sign_in()
        page = browser.get("/auth/", X_Request_ID="r-17")
        text = page.text
        assert "Notebook could not start. Try again, or tell your administrator (request ID r-17)." in text
        assert "secret" not in page.source
        assert "Start Notebook" in text

    def test_the_error_of_a_backend_is_for_operators(self, portal) -> None:
        app, manager = portal
        manager.agents["alice"] |= {"state": "unknown", "detail": "cannot connect to /run/docker.sock"}
        browser = Browser(app)
        browser.sign_in()
        for path in ("/auth/", "/auth/status", "/auth/waiting"):
            page = browser.get(path)
            assert "nreachable" in page.source or "unknown" in page.source
            assert "docker.sock" not in page.source

    def test_which_of_several_apps_the_address_leads_to(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        assert "Selected" not in browser.get("/auth/").text
        manager.agents["alice:lab"] = agent("alice:lab")
        browser.sign_in()
        assert browser.get("/auth/").text.count("Selected") == 1

    def test_nobody_is_led_to_the_form_and_back(self, portal) -> None:
        app, _ = portal
        page = Browser(app).get("/auth/")
        assert (page.status, page.location) == (303, "/auth/login?next=%2Fauth%2F")
        assert Browser(app).get("/auth").location == "/auth/"

    def test_no_app_at_all(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        del manager.agents["alice"]
        assert "You have no apps yet" in browser.get("/auth/").text

    def test_status_tells_programs_nothing_of_the_host(self, portal) -> None:
        app, _ = portal
        program = Program(app)
        program.post("/auth/login", {"user": "alice", "password": "correct horse"})
        answer = program.get("/auth/status")
        assert answer.json["agents"][0] == {
            "name": "alice", "app": "demo", "state": "running", "stage": "", "detail": "", "fraction": None,
            "since": "2026-01-01T10:00:00+00:00", "last_used": None, "outdated": False,
        }  # fmt: skip
        assert program.get("/auth/").json == answer.json
        assert program.post("/auth/agents", {"agent": "alice", "action": "stop"}).json["state"] == "stopping"


class TestAccount:
    def change(self, browser, **fields):
        values = {"password": "correct horse", "new_password": "brand new one", "again": "brand new one"} | fields
        return browser.submit(browser.get("/auth/account"), "/account/password", values)

    def test_changing_the_password_renews_this_session_and_ends_the_others(self, portal) -> None:
        app, manager = portal
        here, there = Browser(app), Browser(app)
        here.sign_in()
        there.sign_in()
        before = here.cookie()
        page = self.change(here)
        assert (page.status, page.location) == (303, "/auth/account?notice=password")
        assert here.cookie() != before
        assert "Your password is changed" in here.get(page.location).text
        assert there.get("/auth/").status == 303
        assert manager.users["alice"] == "brand new one"

    @pytest.mark.parametrize(
        ("fields", "status", "text"),
        [
            ({"password": "wrong"}, 403, "Wrong password"),
            ({"again": "another"}, 400, "The two new passwords differ"),
            ({"new_password": "short", "again": "short"}, 400, "It has fewer than 8 characters"),
        ],
    )
    def test_what_cannot_be_changed_is_said_and_nothing_happens(self, portal, fields, status, text) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        before = browser.cookie()
        page = self.change(browser, **fields)
        assert page.status == status
        assert text in page.text
        assert (manager.users["alice"], browser.cookie()) == ("correct horse", before)

    def test_no_form_is_shown_for_a_password_that_is_kept_elsewhere(self, portal) -> None:
        app, manager = portal
        manager.changes_passwords = False
        browser = Browser(app)
        browser.sign_in()
        page = browser.get("/auth/account")
        assert "an account that is kept elsewhere. Its password cannot be changed here" in page.text
        assert 'type="password"' not in page.text
        assert page.form("/account/sessions")

    def test_sessions_are_listed_and_ended_one_by_one(self, portal) -> None:
        app, _ = portal
        here, there = Browser(app), Browser(app)
        here.sign_in()
        there.sign_in()
        page = here.get("/auth/account")
        assert page.text.count("Firefox on Linux") == 3
        assert "Firefox on Linux this session 192.0.2.7" in page.text
        other = digest(there.cookie())[:16]
        answer = here.post("/auth/account/sessions", page.form("/account/sessions")["fields"] | {"id": other})
        assert answer.location == "/auth/account?notice=revoked"
        assert there.get("/auth/").status == 303
        assert here.get("/auth/").status == 200

    def test_signing_out_everywhere(self, portal) -> None:
        app, manager = portal
        browsers = [Browser(app) for _ in range(3)]
        for browser in browsers:
            browser.sign_in()
        Browser(app).sign_in("bob", "battery staple")
        page = browsers[0].get("/auth/account")
        fields = page.form("/account/sessions")["fields"] | {"id": "all"}
        answer = browsers[0].post("/auth/account/sessions", fields)
        assert answer.location == "/auth/login?notice=everywhere"
        assert "Clear-Site-Data" in answer.headers
        assert {row["user"] for row in manager.rows.values()} == {"bob"}

    def test_programs(self, portal) -> None:
        app, manager = portal
        program = Program(app)
        program.post("/auth/login", {"user": "alice", "password": "correct horse"})
        assert program.get("/auth/account").json["sessions"][0]["user"] == "alice"
        answer = program.post("/auth/account/password", {"password": "correct horse", "new_password": "12345678"})
        assert (answer.status, answer.json) == (200, {"user": "alice"})
        assert program.get("/auth/status").status == 200
        wrong = program.post("/auth/account/password", {"password": "no", "new_password": "12345678"})
        assert (wrong.status, wrong.json["code"]) == (403, "forbidden")
        assert manager.users["alice"] == "12345678"


class TestTokens:
    def create(self, browser, **fields):
        values = {"note": "nightly  export", "expires": "30d", "password": "correct horse"} | fields
        return browser.submit(browser.get("/auth/account"), "/account/tokens", values)

    @pytest.fixture
    def browser(self, portal):
        browser = Browser(portal[0])
        browser.sign_in()
        return browser

    def test_a_new_token_is_shown_once(self, portal, browser) -> None:
        page = self.create(browser)
        (token,) = re.findall(r"dsp_[A-Za-z0-9_-]{43}", page.source)
        assert page.status == 200 and "it is not shown again" in page.text
        assert "no-store" in page.headers["Cache-Control"]
        assert portal[1].calls[-2] == (
            "create_my_token",
            digest(browser.cookie()),
            "192.0.2.7",
            "30d",
            "nightly export",
        )
        again = browser.get("/auth/account")
        assert token not in again.source and "nightly export" in again.text
        assert "created" in again.text and "never used" in again.text
        assert browser.get("/auth/account/tokens").location == "/auth/account"

    def test_the_page_offers_expiries_and_the_default_first(self, browser) -> None:
        values = re.findall(r'<option value="(\w+)"', browser.get("/auth/account").source)
        assert values[0] == "90d" and "never" in values

    def test_markup_in_a_note_is_text(self, browser) -> None:
        page = self.create(browser, note="<script>alert(1)</script>")
        assert "<script>alert" not in page.source and "&lt;script&gt;alert" in page.source

    def test_a_wrong_password_creates_none_and_is_told_at_its_form(self, portal, browser) -> None:
        page = self.create(browser, password="wrong")
        assert page.status == 403 and portal[1].tokens == []
        assert "Wrong name or password" in page.text.partition("API tokens")[2]

    def test_a_user_without_a_password_needs_none(self, portal, browser) -> None:
        portal[1].changes_passwords = False
        page = self.create(browser, password="")
        assert "dsp_" in page.source and 'type="password"' not in page.source

    def test_revoking(self, portal, browser) -> None:
        self.create(browser)
        (token,) = portal[1].tokens
        page = browser.submit(browser.get("/auth/account"), "/account/tokens/revoke", {"id": token["id"]})
        assert page.location == "/auth/account?notice=token-revoked"
        assert "That token is revoked" in browser.get(page.location).text
        assert portal[1].tokens == []

    def test_forms_of_others_are_refused(self, portal, browser) -> None:
        self.create(browser)
        fields = browser.get("/auth/account").form("/account/tokens")["fields"]
        body = fields | {"note": "x", "password": "correct horse", "id": portal[1].tokens[0]["id"]}
        for path in ("/auth/account/tokens", "/auth/account/tokens/revoke"):
            assert browser.post(path, body | {"token": "forged"}).status == 403
            assert browser.post(path, body, Origin="https://evil.test", Sec_Fetch_Site="cross-site").status == 403
            assert browser.post(path, body, Sec_Fetch_Mode="cors", Sec_Fetch_Dest="empty").status == 403
            assert Browser(portal[0]).post(path, body).status == 403
        assert len(portal[1].tokens) == 1

    @pytest.mark.parametrize("revoke", [True, False])
    def test_a_new_password_revokes_tokens_unless_the_box_is_cleared(self, portal, browser, revoke) -> None:
        assert "Revoke my API tokens" not in browser.get("/auth/account").text
        self.create(browser)
        page = browser.get("/auth/account")
        assert "Revoke my API tokens, too" in page.text
        form = page.form("/account/password")
        fields = form["fields"] | {
            "password": "correct horse", "new_password": "brand new one", "again": "brand new one",
        }  # fmt: skip
        if not revoke:
            del fields["tokens"]
        assert browser.post(form["action"], fields).status == 303
        assert len(portal[1].tokens) == (0 if revoke else 1)

    def test_an_earlier_manager_has_none(self, portal, browser) -> None:
        client = portal[1]
        found = client.my_sessions
        client.my_sessions = lambda sha256: {
            key: value for key, value in found(sha256).items() if "token" not in key
        }
        page = browser.get("/auth/account")
        assert page.status == 200 and "API tokens" not in page.text

    def test_programs(self, portal) -> None:
        program = Program(portal[0])
        program.post("/auth/login", {"user": "alice", "password": "correct horse"})
        made = program.post("/auth/account/tokens", {"note": "x", "expires": "7d", "password": "correct horse"})
        assert made.status == 201 and made.json["token"].startswith("dsp_")
        assert [token["id"] for token in program.get("/auth/account").json["tokens"]] == [made.json["id"]]
        assert program.post("/auth/account/tokens", {"note": "x", "password": "no"}).status == 403
        assert program.post("/auth/account/tokens/revoke", {"id": made.json["id"]}).json == {"revoked": 1}
        assert program.post("/auth/account/tokens/revoke", {"id": made.json["id"]}).status == 404


class TestTheRest:
    def test_a_balancers_check_needs_no_session_no_cookie_and_no_manager(self, portal) -> None:
        app, manager = portal
        manager.down = True
        answer = Browser(app).get("/auth/health")
        assert (answer.status, answer.source) == (200, "ok\n")
        assert "Set-Cookie" not in answer.headers and answer.headers["Cache-Control"] == "no-store"

    def test_static_files_are_cached_for_ever_under_their_hash(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        names = re.findall(r'"(/auth/static/[^"]+)"', browser.get("/auth/login").source)
        assert len(names) == 3
        for name in names:
            page = browser.get(name, Sec_Fetch_Dest="script", Sec_Fetch_Mode="no-cors")
            assert page.status == 200
            assert page.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert browser.get("/auth/static/portal.css").status == 404

    def test_pages_load_nothing_from_elsewhere(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        browser.sign_in()
        for path in ("/auth/login", "/auth/", "/auth/account", "/auth/logout", "/auth/nothing"):
            source = browser.get(path).source
            assert not re.search(r'(src|href|action)="(?!/|#)', source), path
            assert not re.search(r"<[^>]+\s(style|on\w+)=", source), path
            assert source.count("<h1>") == 1
            assert '<html lang="en">' in source

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/auth/nothing", 404), ("POST", "/auth/status", 405), ("DELETE", "/auth/login", 405)],
    )
    def test_errors_for_people_and_for_programs(self, portal, method: str, path: str, status: int) -> None:
        app, _ = portal
        browser, program = Browser(app), Program(app)
        for client, headers in ((browser, browser.headers(method)), (program, {"Accept": "*/*"})):
            response = client.client.open(path, method=method, headers=headers)
            assert response.status_code == status
            assert response.headers["Cache-Control"] == "no-store"
            if client is program:
                assert response.mimetype == "application/problem+json"
                assert response.get_json()["status"] == status
            else:
                assert response.mimetype == "text/html"
            if status == 405:
                assert "Allow" in response.headers

    def test_a_body_that_is_too_big(self, portal) -> None:
        app, _ = portal
        page = Browser(app).post("/auth/login", {"user": "x" * 100_000})
        assert page.status == 413
        assert "The request is too large." in page.text

    def test_a_mistake_of_the_portal_shows_no_inside(self, portal, monkeypatch, log_output) -> None:
        log.configure(stream=log_output)
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        monkeypatch.setattr(manager, "my_agents", lambda _: {"secret": 1}["agents"])
        page = browser.get("/auth/?password=hunter2", X_Request_ID="r-17")
        assert page.status == 500
        assert "The portal failed" in page.text
        assert "KeyError" not in page.source
        assert "r-17" in page.text
        assert "r-17" in log_output.getvalue()
        assert "hunter2" not in log_output.getvalue()

    def test_another_prefix(self) -> None:
        app, _ = make(prefix="/-/portal")
        browser = Browser(app)
        assert browser.get("/-/portal/").location == "/-/portal/login?next=%2F-%2Fportal%2F"
        page = browser.get("/-/portal/login")
        assert browser.submit(page, "/login", {"user": "alice", "password": "correct horse"}).location == "/"
        assert browser.get("/-/portal/").status == 200
        assert browser.get("/auth/login").status == 404


def test_a_missing_page_says_so_once(portal) -> None:
    page = Browser(portal[0]).get("/auth/nothing")
    assert page.source.count("Page not found") == 2  # the title and the heading
    assert "Check the address." in page.text


@pytest.mark.parametrize(
    ("accept", "html", "json"),
    [
        ("", 0, 0),
        ("*/*", 0, 0),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", 1, 0),
        ("TEXT/HTML ; level=1 ; Q=0.25 , application/json;q=0.5", 0.25, 0.5),
        ("text/html;q=0.2, application/xhtml+xml;q=0.7", 0.7, 0),
        ("application/problem+json\t;q=1.000", 0, 1),
        ("text/html;q=0, application/json;q=2", 0, 0),
        ("text/html;q=nan, application/json;q=-1", 0, 0),
        ('text/html;a="b,application/json"', 1, 0),
        (",;,;q=1,", 0, 0),
    ],
)
def test_accept_is_read_by_types_and_qualities(accept: str, html: float, json: float) -> None:
    assert qualities(accept) == (html, json)
