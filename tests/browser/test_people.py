"""What the product is for: two people, each with an app of their own, in two browsers."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import Page, expect

from tests.support.broken_words import BROKEN_WORDS
from tests.support.installation import PASSWORD

pytestmark = pytest.mark.browser


def open_demo(demo, person, name: str) -> Page:
    page = person()
    demo.sign_in(page, name)
    expect(page.get_by_role("heading", level=1)).to_contain_text(f"Notebook of {name}")
    return page


def test_two_people_write_notes_and_see_only_their_own(demo, person) -> None:
    alice, bob = open_demo(demo, person, "alice"), open_demo(demo, person, "bob")
    alice.get_by_label("A new note").fill("Alice's own <b>note</b>")
    alice.get_by_role("button", name="Keep it").click()
    expect(alice.get_by_text("Alice's own <b>note</b>")).to_be_visible()
    bob.get_by_label("A new note").fill("Bob was here")
    bob.keyboard.press("Control+Enter")
    expect(bob.get_by_text("Bob was here")).to_be_visible()
    for page, own, other in ((alice, "Alice's own", "Bob was"), (bob, "Bob was", "Alice's own")):
        page.reload()
        expect(page.get_by_text(own)).to_be_visible()
        expect(page.get_by_text(other)).to_have_count(0)


def test_the_clock_ticks_and_stops_at_logout(demo, person) -> None:
    page = person()
    closed = []

    def opened(socket) -> None:
        socket.on("close", lambda _: closed.append(time.monotonic()))

    page.on("websocket", opened)
    demo.sign_in(page, "alice")
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    before = page.locator("#time").inner_text()
    expect(page.locator("#time")).not_to_have_text(before, timeout=3000)
    other = page.context.new_page()
    other.goto(f"{demo.url}/auth/")
    left = time.monotonic()
    other.get_by_role("button", name="Sign out").click()
    expect(other.get_by_text("You are signed out")).to_be_visible()
    while not closed and time.monotonic() < left + 5:
        page.wait_for_timeout(20)
    assert closed, "the WebSocket stayed open"
    assert closed[0] - left < 2
    expect(page.get_by_text("The connection is closed")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_upload_and_download(demo, person, tmp_path) -> None:
    page = open_demo(demo, person, "alice")
    content = bytes(range(256)) * 8192
    source = tmp_path / "holiday photo é.bin"
    source.write_bytes(content)
    page.locator("#upload").set_input_files(source)
    link = page.get_by_role("link", name="holiday photo é.bin")
    expect(link).to_be_visible()
    with page.expect_download() as waiting:
        link.click()
    assert waiting.value.suggested_filename == "holiday photo é.bin"
    waiting.value.save_as(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content
    page.get_by_role("button", name="Delete holiday photo é.bin").click()
    expect(link).to_have_count(0)


def test_an_app_sees_its_user_and_no_secret(demo, person) -> None:
    page = open_demo(demo, person, "alice")
    headers = page.evaluate("fetch('/about').then(r => r.json())")["headers"]
    fields = {name.lower(): value for name, value in headers}
    assert fields["x-dispatcher-user"] == "alice"
    assert "dispatcher" not in fields.get("cookie", "")
    assert page.evaluate("document.cookie") == ""
    cookies = {cookie["name"]: cookie for cookie in page.context.cookies()}
    assert {"dispatcher", "dispatcher-device", "dispatcher-form"} <= set(cookies)
    assert all(cookie["httpOnly"] and cookie["sameSite"] == "Lax" for cookie in cookies.values())


def test_a_wrong_password_and_then_the_right_one_by_keyboard_alone(demo, person) -> None:
    page = person()
    page.goto(f"{demo.url}/notes.md")
    assert page.evaluate("document.activeElement.id") == "user"
    page.keyboard.type("alice")
    page.keyboard.press("Tab")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Name and password do not match")
    assert page.evaluate("document.activeElement.id") == "password"
    page.keyboard.type(PASSWORD)
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    assert waiting.value.suggested_filename == "notes.md"


def test_two_tabs_and_a_form_that_outlives_the_proxy(demo, person) -> None:
    first = person()
    second = first.context.new_page()
    for page in (first, second):
        page.goto(demo.url)
        page.get_by_label("Name").fill("alice")
        page.get_by_label("Password").fill(PASSWORD)
    first.get_by_role("button", name="Sign in").click()
    expect(first.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    demo.kill("proxy")
    demo.start("proxy")
    second.get_by_role("button", name="Sign in").click()
    expect(second.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    first.reload()
    expect(first.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")


def test_signing_in_feels_instant(demo, person) -> None:
    """From the click to the app's page; the best of three, as other tests use the same cores."""
    open_demo(demo, person, "alice").context.close()
    took = []
    for _ in range(3):
        page = person()
        page.goto(demo.url)
        page.get_by_label("Name").fill("alice")
        page.get_by_label("Password").fill(PASSWORD)
        begun = time.monotonic()
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"{demo.url}/")
        took.append(time.monotonic() - begun)
        page.context.close()
    assert min(took) < 2


def test_dashboard_stops_and_starts_an_app(demo, person) -> None:
    page = open_demo(demo, person, "bob")
    page.get_by_role("link", name="My apps").click()
    card = page.locator("[data-agent=bob]")
    expect(card).to_contain_text("Running")
    card.get_by_role("button", name="Stop").click()
    expect(card).to_contain_text("Stopped")  # the page follows by itself
    card.get_by_role("button", name="Start").click()
    expect(card).to_contain_text("Running")
    card.get_by_role("link", name="Open").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of bob")


def test_account_changes_the_password_and_ends_other_sessions(demo, person) -> None:
    name = "carol"
    demo.add(name)
    here, there = open_demo(demo, person, name), open_demo(demo, person, name)
    here.goto(f"{demo.url}/auth/account")
    expect(here.locator(".sessions li")).to_have_count(2)
    here.get_by_label("Current password").fill(PASSWORD)
    here.get_by_label("New password", exact=True).fill("another long one")
    here.get_by_label("New password, again").fill("another long one")
    here.get_by_role("button", name="Change the password").click()
    expect(here.get_by_text("Your password is changed")).to_be_visible()
    expect(here.locator(".sessions li")).to_have_count(1)
    there.goto(demo.url)
    expect(there.get_by_role("heading", name="Sign in")).to_be_visible()
    here.goto(demo.url)
    expect(here.get_by_role("heading", level=1)).to_contain_text(f"Notebook of {name}")
    here.goto(f"{demo.url}/auth/account")
    here.get_by_role("button", name="Sign out everywhere").click()
    expect(here.get_by_text("signed out on all your devices")).to_be_visible()


def reach(demo, token: str, path: str = "/") -> int:
    """Send what a program sends with a token; return the status."""
    request = urllib.request.Request(demo.url + path, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("scripts", [True, False])
def test_a_token_is_made_on_a_phone_used_by_a_program_and_revoked(demo, person, scripts: bool) -> None:
    page = person(viewport={"width": 320, "height": 640}, java_script_enabled=scripts)
    demo.sign_in(page, "bob", "/auth/account")
    page.get_by_label("What is it for?").fill("Nightly export")
    page.get_by_label("Valid for").select_option("1 year")
    page.get_by_label("Your password").fill(PASSWORD)
    page.get_by_role("button", name="Create a token").click()
    field = page.get_by_role("textbox", name="Your new API token")
    expect(field).to_have_value(re.compile(r"dsp_[A-Za-z0-9_-]{43}"))
    token = field.input_value()
    if scripts:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == token
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
    else:
        expect(page.get_by_role("button", name="Copy")).to_be_hidden()
    assert reach(demo, token) == 200
    assert reach(demo, token, "/auth/account") == 403
    page.goto(f"{demo.url}/auth/account")
    line = page.locator(".tokens li")
    expect(line).to_have_count(1)
    expect(line).to_contain_text("Nightly export")
    assert token not in page.content()
    page.get_by_role("button", name="Revoke the token Nightly export").click()
    expect(page.get_by_text("That token is revoked")).to_be_visible()
    expect(page.locator(".tokens li")).to_have_count(0)
    assert reach(demo, token) == 401


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_and_can_be_read(demo, person, scheme: str) -> None:
    page = person(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    problems = []
    page.on(
        "console", lambda message: problems.append(message.text) if "Content Security" in message.text else None
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    paths = ["/auth/login", "/auth/", "/auth/account", "/auth/logout", "/auth/nothing", "/"]
    demo.sign_in(page, "alice", "/auth/")
    for path in paths:
        page.goto(demo.url + path)
        page.wait_for_load_state("networkidle" if path != "/" else "load")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 320, f"{path} scrolls sideways at {width} px"
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert page.evaluate(BROKEN_WORDS, "h1, h2, h3, p, a, button, label, li, dt, td:first-child") == [], path
        unnamed = page.evaluate(
            """[...document.querySelectorAll('input:not([type=hidden]):not([hidden]), button, a, textarea')]
            .filter(e => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).length"""
        )
        assert unnamed == 0, path
        assert page.evaluate("document.querySelectorAll('main').length") == 1
        assert page.evaluate("document.querySelectorAll('h1').length") == 1
        low = [text for text, ratio in page.evaluate(CONTRAST) if ratio < 4.5]
        assert not low, f"{path}: low contrast: {low}"
    assert not problems


#: WCAG 2.1 contrast of every text against the nearest opaque background.
CONTRAST = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
  const back = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.getClientRects().length || element.closest('.away, .skip, script, .hidden')) continue;
    const one = light(rgb(getComputedStyle(element).color)), two = light(back(element));
    found.push([text.slice(0, 40), (Math.max(one, two) + .05) / (Math.min(one, two) + .05)]);
  }
  return found;
}"""


def test_the_session_is_told_in_words(demo, person) -> None:
    page = open_demo(demo, person, "alice")
    page.goto(f"{demo.url}/auth/account")
    line = page.locator(".sessions li").first
    expect(line).to_contain_text("Chrome on Linux")
    expect(line).to_contain_text(re.compile(r"127\.0\.0\.1 · signed in (just now|\d+ seconds? ago)"))
