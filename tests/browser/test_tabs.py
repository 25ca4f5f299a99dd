"""Two apps, or two people, in two tabs of one browser in session routing: what an old tab sends."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import ARGUMENTS, CHROMIUM, certificate
from tests.support.installation import PASSWORD

pytestmark = pytest.mark.browser
#: Writes down what it receives.  Its page saves by a form, and by a script and a WebSocket ten times a second.
APP = '''
import http.server, os, pathlib, socketserver, sys
received = pathlib.Path(os.environ["DISPATCHER_DATA"]) / "received"
PAGE = """<!doctype html><title>Editor</title><h1>Editor of NAME</h1><form method=post action=/form><input name=text
 value="NAME"><button>Save</button></form><p><a href=/cached>cached</a><script>
 addEventListener("LEAVE", (event) => { event.preventDefault(); event.returnValue = "x"; });
 setInterval(() => { fetch("/save", {method: "POST", body: "NAME"});
 new WebSocket("ws://" + location.host + "/socket?NAME"); }, 100)</script>"""
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body, **fields):
        self.send_response(200)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def note(self, text):
        with received.open("a") as file:
            file.write(text + "\\n")
    def do_GET(self):
        name = os.environ["NAME"] + "-" + self.headers.get("X-Dispatcher-User", "")
        if self.path.startswith("/socket"):
            self.note(self.path)
        if self.path == "/quiet":  # without open requests a browser may remember it
            return self.answer(("<h1>Quiet " + name + "</h1>").encode(), Content_Type="text/html")
        if self.path == "/cached":
            text = ("cached " + name).encode()
            return self.answer(text, Content_Type="text/html", Cache_Control="max-age=3600")
        leave = "beforeunload" if self.path == "/guarded" else "never"
        self.answer(PAGE.replace("NAME", name).replace("LEAVE", leave).encode(), Content_Type="text/html")
    def do_POST(self):
        self.note(self.path + " " + self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.answer(b"saved", Content_Type="text/html")
    def log_message(self, *args):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    def get_request(self):
        return super().get_request()[0], ("proxy", 0)
os.umask(0o007)
Server(sys.argv[1], Handler).serve_forever()
'''


@pytest.fixture(scope="module")
def apps():
    """The apps `one` and `two`."""
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as directory:
        program = Path(directory, "app.py")
        program.write_text(APP)
        program.parent.chmod(0o755)
        yield "".join(
            f'[apps.{name}.environment]\nNAME = "{name}"\n[apps.{name}.subprocess]\nread_only = ["{program}"]\n'
            f'command = ["{{python}}", "{program}", "{{{{socket}}}}"]\n'
            for name in ("one", "two")
        )


@pytest.fixture(scope="module")
def site(make_site, apps):
    """Alice has both apps, bob has `one`."""
    site = make_site(apps, people=())
    for name in ("alice", "bob"):
        site.add(name, "one")
    assert site.admin("POST", "/agents", {"name": "alice", "app": "two"}).status == 201
    return site


def received(site, agent: str) -> list[str]:
    path = site.data(agent) / "received"
    return path.read_text().splitlines() if path.exists() else []


def open_editor(site, page: Page, name: str, path: str = "/") -> None:
    site.sign_in(page, name, path)
    expect(page.get_by_role("heading")).to_have_text(f"Editor of one-{name}")
    expect(page.get_by_role("textbox")).to_be_visible()


def begin_switch(site, page: Page, app: str) -> None:
    page.goto(f"{site.url}/auth/")
    page.locator(f"[data-agent='alice:{app}'], [data-agent=alice]").filter(has_text=app).get_by_role(
        "button", name="Open"
    ).click()


def test_an_old_tab_of_another_app_is_replaced_before_that_opens(site, person) -> None:
    old = person()
    open_editor(site, old, "alice")
    new = old.context.new_page()
    begin_switch(site, new, "two")
    expect(new.get_by_role("heading")).to_have_text("Open two?")
    expect(new.get_by_text("Save your work in the open pages of one first")).to_be_visible()
    before = len(received(site, "alice"))
    new.wait_for_timeout(500)
    assert len(received(site, "alice")) > before  # nothing has changed so far
    new.get_by_role("button", name="Open two").click()
    expect(new.get_by_role("heading")).to_have_text("Editor of two-alice")
    expect(old.get_by_role("heading")).to_have_text("This page was closed")
    new.get_by_role("button", name="Save").click()
    expect(new.get_by_text("saved")).to_be_visible()
    theirs = received(site, "alice:two")
    assert "/form text=two-alice" in theirs
    assert not [line for line in theirs if "one-" in line]
    old.go_back()
    old.wait_for_timeout(500)
    assert not [line for line in received(site, "alice:two") if "one-" in line]


def test_a_tab_with_unsaved_work_is_kept_and_said(site, person) -> None:
    old = person()
    open_editor(site, old, "alice", "/guarded")
    old.get_by_role("textbox").fill("unsaved")
    asked = []
    old.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    new = old.context.new_page()
    begin_switch(site, new, "two")
    new.get_by_role("button", name="Open two").click()
    expect(new.get_by_role("alert")).to_contain_text("it may have unsaved changes")
    assert asked == ["beforeunload"]
    assert old.get_by_role("textbox").input_value() == "unsaved"
    old.close()
    new.get_by_role("button", name="Open two").click()
    expect(new.get_by_role("heading")).to_have_text("Editor of two-alice")


def test_without_open_pages_another_app_opens_at_once(site, person) -> None:
    page = person()
    site.sign_in(page, "alice", "/auth/")
    begin_switch(site, page, "two")
    expect(page.get_by_role("heading")).to_have_text("Editor of two-alice")
    assert page.evaluate("navigator.serviceWorker.getRegistrations().then(all => all.length)") == 0


def test_an_old_tab_of_another_person_reaches_nobody(site, person) -> None:
    old = person()
    open_editor(site, old, "alice")
    new = old.context.new_page()
    new.goto(f"{site.url}/auth/login")
    new.get_by_label("Name").fill("bob")
    new.get_by_label("Password").fill(PASSWORD)
    new.get_by_role("button", name="Sign in").click()
    expect(new.get_by_role("heading")).to_have_text("Editor of one-bob")
    expect(old.get_by_role("heading")).to_have_text("This page was closed")
    new.get_by_role("button", name="Save").click()
    expect(new.get_by_text("saved")).to_be_visible()
    assert "/form text=one-bob" in received(site, "bob")
    assert not [line for line in received(site, "bob") if "alice" in line]


def test_without_service_workers_the_page_says_what_to_do(site, person, monkeypatch) -> None:
    """Over plain HTTP at a host name a browser has none."""
    monkeypatch.setattr(site, "url", site.url.replace("127.0.0.1", "apps.test"))
    old = person()
    open_editor(site, old, "alice")
    new = old.context.new_page()
    begin_switch(site, new, "two")
    expect(new.get_by_text("Close the open pages of one in this browser")).to_be_visible()
    old.close()
    new.get_by_role("button", name="Open two").click()
    expect(new.get_by_role("heading")).to_have_text("Editor of two-alice")


@pytest.fixture
def secure(site_with, apps, tmp_path):
    tmp_path.chmod(0o755)
    proxy = certificate(tmp_path)
    site = site_with(apps, people=(), proxy=proxy, tls=True)
    site.url = f"https://127.0.0.1:{site.port}"
    site.add("alice", "one")
    return site


# What caches keep: the app's `/cached` may be kept for an hour.


@pytest.fixture(params=["127.0.0.1", "apps.test"], ids=["localhost", "plain HTTP"])
def host(site, request, monkeypatch):
    """Browsers obey Clear-Site-Data over HTTPS and on localhost only."""
    monkeypatch.setattr(site, "url", site.url.replace("127.0.0.1", request.param))
    return request.param


def visit_cached(site, page: Page, text: str) -> None:
    for _ in range(2):
        page.goto(f"{site.url}/")
        page.get_by_role("link", name="cached").click()
        expect(page.locator("body")).to_have_text(f"cached {text}")


def test_no_cached_page_of_one_app_is_shown_for_another(site, host, person) -> None:
    page = person()
    open_editor(site, page, "alice")
    visit_cached(site, page, "one-alice")
    begin_switch(site, page, "two")
    if host == "apps.test":
        page.get_by_role("button", name="Open two").click()
    expect(page.get_by_role("heading")).to_have_text("Editor of two-alice")
    visit_cached(site, page, "two-alice")


def test_no_cached_page_of_one_person_is_shown_to_another(site, host, person) -> None:
    page = person()
    open_editor(site, page, "alice")
    visit_cached(site, page, "one-alice")
    page.context.clear_cookies(name="dispatcher")  # her session ends without a sign-out
    site.sign_in(page, "bob")
    if host == "apps.test":
        page.get_by_role("button", name="Open your app").click()
    expect(page.get_by_role("heading")).to_have_text("Editor of one-bob")
    visit_cached(site, page, "one-bob")


@pytest.fixture
def remembering(chromium: Browser):
    """A page with the back-forward cache, which Playwright switches off."""
    ignored = ["--disable-back-forward-cache"]
    browser = chromium.browser_type.launch(executable_path=CHROMIUM, args=ARGUMENTS, ignore_default_args=ignored)
    page = browser.new_context(ignore_https_errors=True).new_page()
    page.set_default_timeout(15_000)
    yield page
    browser.close()


def test_back_after_a_sign_out_shows_nothing_private(secure, remembering) -> None:
    page, site = remembering, secure
    site.sign_in(page, "alice", "/quiet")
    expect(page.get_by_role("heading")).to_have_text("Quiet one-alice")
    page.evaluate("addEventListener('pageshow', (event) => { if (event.persisted) window.restored = true; })")
    page.goto(f"{site.url}/cached")
    page.go_back(wait_until="commit")
    expect(page.get_by_role("heading")).to_have_text("Quiet one-alice")
    assert page.evaluate("window.restored") is True  # the browser does remember pages
    page.goto(f"{site.url}/cached")
    sign_out_and_go_back(site, page)


def test_back_over_plain_http_shows_nothing_of_the_disk_cache(site, person, monkeypatch) -> None:
    monkeypatch.setattr(site, "url", site.url.replace("127.0.0.1", "apps.test"))
    page = person()
    site.sign_in(page, "alice", "/quiet")
    expect(page.get_by_role("heading")).to_have_text("Quiet one-alice")
    page.goto(f"{site.url}/cached")
    sign_out_and_go_back(site, page)


def sign_out_and_go_back(site, page: Page) -> None:
    page.goto(f"{site.url}/auth/account")
    page.get_by_role("button", name="Sign out", exact=True).click()
    expect(page.get_by_text("You are signed out")).to_be_visible()
    for _ in range(4):
        page.go_back(wait_until="commit")
        page.wait_for_timeout(500)
        assert "alice" not in page.inner_text("body")
