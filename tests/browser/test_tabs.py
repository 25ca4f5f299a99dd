"""Two apps, or two people, in two tabs of one browser in session routing: what an old tab sends."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

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
def site(make_site):
    """Alice has the apps `one` and `two`, bob has `one`."""
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as directory:
        program = Path(directory, "app.py")
        program.write_text(APP)
        program.parent.chmod(0o755)
        apps = "".join(
            f'[apps.{name}.environment]\nNAME = "{name}"\n[apps.{name}.subprocess]\nread_only = ["{program}"]\n'
            f'command = ["{{python}}", "{program}", "{{{{socket}}}}"]\n'
            for name in ("one", "two")
        )
        site = make_site(apps, people=())
        for name in ("alice", "bob"):
            site.add(name, "one")
        assert site.admin("POST", "/agents", {"name": "alice", "app": "two"}).status == 201
        yield site


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


def test_without_service_workers_the_page_says_what_to_do(site, person) -> None:
    """Over plain HTTP at a host name a browser has none."""
    site.url, local = site.url.replace("127.0.0.1", "apps.test"), site.url
    try:
        old = person()
        open_editor(site, old, "alice")
        new = old.context.new_page()
        begin_switch(site, new, "two")
        expect(new.get_by_text("Close the open pages of one in this browser")).to_be_visible()
        old.close()
        new.get_by_role("button", name="Open two").click()
        expect(new.get_by_role("heading")).to_have_text("Editor of two-alice")
    finally:
        site.url = local
