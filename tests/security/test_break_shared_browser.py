"""Two people at one browser, in session routing, where the first did not sign out: the session just ended."""

from __future__ import annotations

import re

import pytest

from tests.support.portal_manager import Browser, Program, digest, make


@pytest.fixture
def portal():
    return make()


def test_the_second_finds_nothing_that_an_app_of_the_first_left(portal) -> None:
    app, manager = portal
    browser = Browser(app)
    browser.sign_in()
    manager.rows.clear()  # the session ends by itself
    browser.set_cookie("lab-token", "of-alice")
    page = browser.sign_in("bob", "battery staple")
    assert page.status == 303
    assert page.location.startswith("/auth/welcome?next=%2F&proof=")
    assert page.headers["Clear-Site-Data"] == '"cache", "storage"'
    assert browser.cookie("lab-token") is None
    assert browser.submit(browser.get(page.location), "/welcome").status == 303
    assert browser.cookie("dispatcher")
    assert browser.cookie("dispatcher-device")


def test_the_same_person_keeps_what_the_app_stored(portal) -> None:
    app, manager = portal
    browser = Browser(app)
    browser.sign_in()
    manager.rows.clear()
    browser.set_cookie("lab-token", "of-alice")
    page = browser.sign_in()
    assert "Clear-Site-Data" not in page.headers
    assert browser.cookie("lab-token") == "of-alice"


def test_the_session_begins_once_the_pages_of_the_first_are_replaced(portal) -> None:
    app, manager = portal
    browser = Browser(app)
    assert browser.sign_in().location == "/"
    alice = browser.cookie()
    page = browser.get(browser.sign_in("bob", "battery staple").location)
    assert "Somebody else used this browser before" in page.text
    assert browser.cookie() is None  # what an old page sends reaches nobody
    assert digest(alice) not in manager.rows
    worker = re.search(r'data-pages="replace" data-worker="(/auth/static/windows[^"]*)"', page.source)[1]
    assert browser.get(worker).headers["Service-Worker-Allowed"] == "/"
    assert "worker-src http://portal.test:8080/auth/static/;" in page.headers["Content-Security-Policy"] + ";"
    answer = browser.submit(page, "/welcome")
    assert (answer.status, answer.location) == (303, "/")
    assert manager.rows[digest(browser.cookie())]["user"] == "bob"
    assert browser.cookie("dispatcher-nonce") is None
    assert browser.submit(page, "/welcome").status == 403  # sent twice
    assert manager.rows[digest(browser.cookie())]["user"] == "bob"
    assert browser.get("/auth/welcome?next=/x").location == "/x"  # Back, or a link on another site
    assert "another person signed in" in browser.get("/auth/replaced").text


def test_a_session_begins_for_nobody_without_its_cookie(portal) -> None:
    browser = Browser(portal[0])
    browser.sign_in()
    page = browser.get(browser.sign_in("bob", "battery staple").location)
    assert browser.post("/auth/welcome", {"token": "x"}).status == 403
    other = Browser(portal[0])
    other.sign_in()
    browser.set_cookie("dispatcher-nonce", other.cookie())  # planted by a page of an app
    assert browser.submit(page, "/welcome").status == 403
    assert browser.cookie() is None


def test_a_failed_sign_in_and_hosts_of_their_own_clear_nothing(portal) -> None:
    browser = Browser(portal[0])
    browser.set_cookie("lab-token", "of-alice")
    assert "Clear-Site-Data" not in browser.sign_in(password="wrong").headers
    assert browser.cookie("lab-token") == "of-alice"
    app, _ = make(routing="subdomain", public_url="https://apps.example")
    answer = Program(app, "https://apps.example").post(
        "/auth/login", {"user": "bob", "password": "battery staple"}
    )
    assert answer.status == 200
    assert "Clear-Site-Data" not in answer.headers
