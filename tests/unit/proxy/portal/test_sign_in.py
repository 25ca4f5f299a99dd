"""Signing in and out at the portal, as people and programs do, with a manager in memory."""

from __future__ import annotations

import inspect
import re
import threading

import pytest

from dispatcher.client.manager_client import ManagerClient
from dispatcher.plugin.errors import DeadlineExceeded
from dispatcher.proxy.portal import context
from tests.support.portal_manager import Browser, Manager, Program, digest, make

LOG = ["Traceback (most recent call last):", "ModuleNotFoundError: No module named 'numpy'"]
FAILURE = {"what": "The demo could not start", "why": "exit code 1", "fix": "install numpy", "log": LOG}


@pytest.fixture
def portal():
    return make()


def test_the_stand_in_has_the_signatures_of_the_real_client() -> None:
    for name, method in inspect.getmembers(Manager, inspect.isfunction):
        if not name.startswith("_"):
            real = inspect.signature(getattr(ManagerClient, name)).parameters
            assert list(real) == list(inspect.signature(method).parameters), name


class TestSignIn:
    def test_the_form_leads_on_to_where_one_wanted_to_go(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        page = browser.get("/auth/login?next=/lab%3Fx%3D1")
        assert page.status == 200
        page = browser.submit(page, "/login", {"user": "alice", "password": "correct horse"})
        assert (page.status, page.location, page.source) == (303, "/lab?x=1", "")
        assert digest(browser.cookie()) in manager.rows
        name, user, address, user_agent, device = manager.calls[-1]
        assert (name, user, address, device) == ("login", "alice", "192.0.2.7", None)
        assert "Firefox" in user_agent

    @pytest.mark.parametrize("secure", [False, True])
    def test_cookies_are_for_this_host_and_no_script(self, secure: bool) -> None:
        app, _ = make(public_url="https://portal.test" if secure else "")
        page = Browser(app, "https://portal.test" if secure else "http://portal.test").sign_in()
        cookies = {line.partition("=")[0]: line for line in page.headers.getlist("Set-Cookie")}
        prefix = "__Host-" if secure else ""
        assert set(cookies) == {f"{prefix}dispatcher", f"{prefix}dispatcher-device"}
        for line in cookies.values():
            attributes = {part.partition("=")[0].strip().lower(): part for part in line.split(";")[1:]}
            assert {"httponly", "samesite", "path", "max-age"} <= set(attributes)
            assert ("secure" in attributes) is secure
            assert "domain" not in attributes
            assert "SameSite=Lax" in line
            assert "Path=/;" in line + ";"
        assert "Max-Age=604800" in cookies[f"{prefix}dispatcher"]

    def test_a_wrong_password_keeps_the_name_and_the_target(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        page = browser.submit(
            browser.get("/auth/login?next=/lab"), "/login", {"user": "alice", "password": "oops"}
        )
        assert page.status == 403
        assert "Name and password do not match." in page.text
        assert page.form("/login")["fields"]["user"] == "alice"
        assert page.form("/login")["fields"]["next"] == "/lab"
        assert "oops" not in page.source
        assert browser.cookie() is None

    def test_unknown_impossible_and_wrong_get_the_same_answer(self, portal) -> None:
        app, _ = portal
        pages = []
        for user in ("alice", "nobody", "\0"):
            browser = Browser(app)
            page = browser.submit(browser.get("/auth/login"), "/login", {"user": user, "password": "oops"})
            source = re.sub(r'(nonce|value)="[^"]*"', "", page.source)
            pages.append((page.status, source))
        assert pages[0] == pages[1] == pages[2]

    def test_slowing_down_says_how_long(self, portal) -> None:
        app, manager = portal
        manager.slowed = 90
        page = Browser(app).sign_in()
        assert (page.status, page.headers["Retry-After"]) == (429, "90")
        assert "Try again in 2 minutes" in page.text
        answer = Program(app).post("/auth/login", {"user": "alice", "password": "x"})
        assert (answer.status, answer.headers["Retry-After"]) == (429, "90")
        assert answer.json["code"] == "too-many-requests"

    def test_the_device_is_shown_to_the_manager_and_outlives_the_session(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        device = browser.cookie("dispatcher-device")
        browser.submit(browser.get("/auth/logout"), "/logout")
        assert browser.cookie() is None
        browser.sign_in()
        assert next(call for call in reversed(manager.calls) if call[0] == "login")[-1] == device

    def test_programs_sign_in_with_json(self, portal) -> None:
        app, manager = portal
        program = Program(app)
        assert program.get("/auth/login").json["sign_in"]["method"] == "POST"
        answer = program.post("/auth/login", {"user": "alice", "password": "correct horse", "next": "//evil"})
        assert answer.status == 200
        assert answer.json == {
            "user": "alice", "agent": "alice", "agents": ["alice"], "ttl": 86400.0, "next": "/",
        }  # fmt: skip
        assert "token" not in answer.source
        assert program.get("/auth/status").json["user"] == "alice"
        wrong = Program(app).post("/auth/login", {"user": "alice", "password": "x"})
        assert (wrong.status, wrong.response.mimetype) == (403, "application/problem+json")
        assert wrong.json["title"] == "Name and password do not match"
        assert len(manager.rows) == 1

    @pytest.mark.parametrize(
        ("body", "status"), [([], 400), ("text", 400), ({"user": 1, "password": ["x"]}, 403), ({}, 403)]
    )
    def test_odd_json_signs_nobody_in(self, portal, body, status) -> None:
        app, _ = portal
        assert Program(app).post("/auth/login", body).status == status

    @pytest.mark.parametrize(
        "body", ["[" * 30000, '{"user":' * 7000, '{"user": 1'], ids=["lists", "objects", "cut"]
    )
    def test_json_that_cannot_be_parsed_is_a_bad_request(self, portal, body: str) -> None:
        app, _ = portal
        answer = app.test_client().post("/auth/login", data=body, content_type="application/json")
        assert answer.status_code == 400

    def test_who_is_signed_in_goes_on_with_one_click(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        browser.sign_in()
        page = browser.get("/auth/login?next=/lab")
        assert "You are signed in as alice" in page.text
        assert 'href="/lab"' in page.source

    def test_many_at_once_are_told_to_wait_and_others_are_served(self, portal, monkeypatch) -> None:
        app, manager = portal
        app.extensions[context.EXTENSION].logins._size = 2  # noqa: SLF001 - one for each address
        entered, leave = threading.Event(), threading.Event()
        real = manager.login

        def slow(*values):
            entered.set()
            assert leave.wait(10)
            return real(*values)

        monkeypatch.setattr(manager, "login", slow)
        first = Browser(app)
        thread = threading.Thread(target=first.sign_in)
        thread.start()
        try:
            assert entered.wait(10)
            second = Browser(app)
            page = second.sign_in()
            assert (page.status, page.headers["Retry-After"]) == (429, "2")
            assert second.get("/auth/login").status == 200
        finally:
            leave.set()
            thread.join(10)
        assert first.cookie()
        assert second.sign_in().status == 303

    def test_a_queue_that_takes_too_long_asks_to_try_again(self, portal, monkeypatch) -> None:
        app, manager = portal

        def late(*_):
            raise DeadlineExceeded("The password was not checked in time")

        monkeypatch.setattr(manager, "login", late)
        page = Browser(app).sign_in()
        assert (page.status, page.headers["Retry-After"]) == (429, "2")
        assert page.form("/login")["fields"]["user"] == "alice"

    def test_a_manager_that_is_down_is_said_so(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        page = browser.get("/auth/login")
        manager.down = True
        page = browser.submit(page, "/login", {"user": "alice", "password": "correct horse"})
        assert page.status == 503
        assert "The manager does not answer." in page.text


class TestSignOut:
    def test_it_is_asked_first_and_then_done(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        token = browser.cookie()
        page = browser.get("/auth/logout")
        assert page.status == 200
        assert digest(token) in manager.rows
        page = browser.submit(page, "/logout")
        assert (page.status, page.location) == (303, "/auth/login?notice=signed-out")
        assert page.headers["Clear-Site-Data"] == '"cache", "storage"'
        assert not manager.rows
        assert browser.cookie() is None
        assert "You are signed out" in browser.get(page.location).text

    def test_cookies_of_apps_go_and_the_portals_stay(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        browser.set_cookie("_xsrf", "of-alices-app")
        browser.sign_in()
        browser.submit(browser.get("/auth/logout"), "/logout")
        assert browser.cookie("_xsrf") is None
        assert browser.cookie("dispatcher-device")
        assert browser.cookie("dispatcher-form")

    def test_nobody_is_led_to_the_form(self, portal) -> None:
        app, _ = portal
        assert Browser(app).get("/auth/logout").location == "/auth/login"

    def test_programs(self, portal) -> None:
        app, manager = portal
        program = Program(app)
        program.post("/auth/login", {"user": "alice", "password": "correct horse"})
        assert program.post("/auth/logout", {}).json == {"signed_out": True}
        assert not manager.rows
        assert program.get("/auth/status").status == 401
