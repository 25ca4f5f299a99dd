"""Over HTTPS: the names of cookies bind them to the host, and everything else goes on as before."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import certificate

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(make_site, tmp_path_factory):
    base = tmp_path_factory.mktemp("tls")
    base.chmod(0o755)
    site = make_site(proxy=certificate(base), tls=True)
    site.url = f"https://localhost:{site.port}"
    return site


def test_signing_in_and_out(site, person) -> None:
    page = person(ignore_https_errors=True)
    site.sign_in(page, "alice")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    cookies = {cookie["name"]: cookie for cookie in page.context.cookies()}
    assert set(cookies) == {"__Host-dispatcher", "__Host-dispatcher-device", "__Host-dispatcher-form"}
    assert all(cookie["secure"] and cookie["httpOnly"] and cookie["path"] == "/" for cookie in cookies.values())
    assert page.evaluate("fetch('/about').then(r => r.json())")["headers"]
    page.get_by_role("link", name="Sign out").click()
    page.locator("main").get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("You are signed out")).to_be_visible()
    left = {cookie["name"] for cookie in page.context.cookies()}
    assert "__Host-dispatcher" not in left
    assert "__Host-dispatcher-device" in left


def test_an_app_cannot_plant_a_cookie_of_the_portals(site, person) -> None:
    """Neither in place of the session, nor beside it, nor for the next person's form."""
    page = person(ignore_https_errors=True)
    site.sign_in(page, "alice")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    token = next(cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "__Host-dispatcher")
    for attributes in ("path=/; secure", "path=/auth; secure", "path=/; domain=localhost; secure"):
        for name in ("__Host-dispatcher", "dispatcher", "__Host-dispatcher-form"):
            page.evaluate("text => { document.cookie = text; }", f"{name}={'x' * 43}; {attributes}")
    kept = [cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "__Host-dispatcher"]
    assert kept == [token]
    page.goto(f"{site.url}/auth/")
    expect(page.get_by_role("heading", name="My apps")).to_be_visible()
