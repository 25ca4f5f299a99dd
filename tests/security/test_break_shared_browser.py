"""Two people at one browser, in session routing, where the first did not sign out: the session just ended."""

from __future__ import annotations

import pytest

from tests.support.portal_manager import Browser, Manager, Program, make


class Knowing(Manager):
    """Gives back a device token that it knows for the user, as the real one does."""

    def __init__(self):
        super().__init__()
        self.devices = {}

    def login(self, user, password, address, user_agent=None, device=None):
        answer = super().login(user, password, address, user_agent, device)
        if self.devices.get(device) == user:
            answer["device"] = device
        self.devices[answer["device"]] = user
        return answer


@pytest.fixture
def portal():
    return make(Knowing())


def test_the_second_finds_nothing_that_an_app_of_the_first_left(portal) -> None:
    app, manager = portal
    browser = Browser(app)
    browser.sign_in()
    manager.rows.clear()  # the session ends by itself
    browser.set_cookie("lab-token", "of-alice")
    page = browser.sign_in("bob", "battery staple")
    assert page.status == 303
    assert page.headers["Clear-Site-Data"] == '"cache", "storage"'
    assert browser.cookie("lab-token") is None
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


def test_a_failed_sign_in_and_hosts_of_their_own_clear_nothing(portal) -> None:
    browser = Browser(portal[0])
    browser.set_cookie("lab-token", "of-alice")
    assert "Clear-Site-Data" not in browser.sign_in(password="wrong").headers
    assert browser.cookie("lab-token") == "of-alice"
    app, _ = make(Knowing(), routing="subdomain", public_url="https://apps.example")
    answer = Program(app, "https://apps.example").post(
        "/auth/login", {"user": "bob", "password": "battery staple"}
    )
    assert answer.status == 200
    assert "Clear-Site-Data" not in answer.headers
