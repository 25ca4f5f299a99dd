"""Subdomain routing in a real browser: *.localhost resolves by itself."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from dispatcher.plugin import names
from tests.support.installation import PASSWORD

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(make_site):
    site = make_site(proxy='routing = "subdomain"\npublic_url = "http://apps.localhost:PORT"')
    site.url = f"http://apps.localhost:{site.port}"
    return site


def host(site, name: str) -> str:
    return f"http://{names.key(name)}.apps.localhost:{site.port}"


def test_each_app_has_an_origin_of_its_own(site, person) -> None:
    page = person()
    site.sign_in(page, "alice", "/auth/")
    page.get_by_role("link", name="Open").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    assert page.url == f"{host(site, 'alice')}/"
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    page.get_by_label("A new note").fill("on my own host")
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_text("on my own host")).to_be_visible()
    tokens = {
        cookie["domain"]: cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "dispatcher"
    }
    assert set(tokens) == {"apps.localhost", host(site, "alice").partition("//")[2].partition(":")[0]}
    assert len(set(tokens.values())) == 2


def test_a_bookmark_of_the_app_leads_through_the_sign_in_and_back(site, person) -> None:
    page = person()
    page.goto(f"{host(site, 'bob')}/?view=all")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.url.startswith(site.url)
    page.get_by_label("Name").fill("bob")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of bob")
    assert page.url == f"{host(site, 'bob')}/?view=all"


def test_a_fragment_survives_the_hand_over(site, person) -> None:
    page = person()
    page.goto(f"{host(site, 'alice')}/?view=all#cell-7")
    page.get_by_label("Name").fill("alice")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    assert page.url == f"{host(site, 'alice')}/?view=all#cell-7"


def test_another_users_host_is_refused(site, person) -> None:
    page = person()
    site.sign_in(page, "alice", "/auth/")
    answer = page.goto(f"{host(site, 'bob')}/about")
    assert answer.status in {403, 404}
    assert "bob" not in page.inner_text("body")
    assert not any(
        cookie["name"] == "dispatcher" and "bob" in cookie["domain"] for cookie in page.context.cookies()
    )


def test_signing_out_ends_the_session_on_every_host(site, person) -> None:
    page = person()
    closed = []
    page.on("websocket", lambda socket: socket.on("close", lambda _: closed.append(socket.url)))
    site.sign_in(page, "alice", "/auth/")
    page.get_by_role("link", name="Open").click()
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    other = page.context.new_page()
    other.goto(f"{host(site, 'alice')}/auth/logout")
    other.locator("main").get_by_role("button", name="Sign out").click()
    expect(other.get_by_text("You are signed out")).to_be_visible()
    page.wait_for_timeout(2000)
    assert closed
    page.goto(f"{host(site, 'alice')}/")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


CACHED = """
import os, socketserver, sys
from http.server import BaseHTTPRequestHandler
class Handler(BaseHTTPRequestHandler):
    def address_string(self): return "-"
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Cache-Control", "max-age=3600")
        self.end_headers()
        self.wfile.write(b"<h1>Private</h1>")
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
os.umask(0o007)
Server(sys.argv[1], Handler).serve_forever()
"""


def test_the_sign_in_clears_what_the_browser_keeps_of_an_agents_host(site_with, person) -> None:
    command = f"[apps.one.subprocess]\ncommand = [\"{{python}}\", \"-c\", '''{CACHED}''', \"{{{{socket}}}}\"]\n"
    site = site_with(
        command, people=("alice",), proxy='routing = "subdomain"\npublic_url = "http://apps.localhost:PORT"'
    )
    site.url = f"http://apps.localhost:{site.port}"
    page = person()
    site.sign_in(page, "alice", "/auth/")
    page.get_by_role("link", name="Open").click()
    expect(page.get_by_role("heading", name="Private")).to_be_visible()
    page.goto(f"{host(site, 'alice')}/page")
    page.goto(f"{host(site, 'alice')}/auth/logout")
    page.locator("main").get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("You are signed out")).to_be_visible()
    page.goto(f"{host(site, 'alice')}/other")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.goto(f"{host(site, 'alice')}/page")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_sibling_hosts_page_cannot_post_or_open_a_socket(site, person) -> None:
    """Sibling hosts are the same site: SameSite cookies do not help, the Origin does."""
    page = person(bypass_csp=True)  # the attacker's page has no policy against itself
    site.sign_in(page, "alice", "/auth/")
    page.get_by_role("link", name="Open").click()
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    target = host(site, "alice")
    sibling = page.context.new_page()
    sibling.goto(f"{host(site, 'bob')}/auth/static/nothing")
    socket = """target => new Promise(done => { const socket = new WebSocket(target.replace('http', 'ws') + '/clock');
        socket.onopen = () => done('open'); socket.onerror = () => done('refused'); })"""
    assert sibling.evaluate(socket, target) == "refused"
    assert page.evaluate(socket, target) == "open"
    post = """target => fetch(target + '/notes', {method: 'POST', mode: 'no-cors', credentials: 'include',
        body: '{"text": "from a sibling"}'}).then(() => 'sent')"""
    assert sibling.evaluate(post, target) == "sent"
    page.reload()
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    expect(page.get_by_text("from a sibling")).to_have_count(0)
    page.evaluate(post, target)
    page.reload()
    expect(page.get_by_text("from a sibling")).to_be_visible()
