"""Apps share the portal's origin in session routing: what their pages cannot do in a real browser."""

from __future__ import annotations

import http.server
import threading

import pytest
from playwright.sync_api import Page, expect

from tests.support.installation import PASSWORD

pytestmark = pytest.mark.browser


@pytest.fixture
def app(demo, person) -> Page:
    """Alice's app, open; what a test evaluates runs as a script of the app would."""
    page = person()
    demo.sign_in(page, "alice")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    return page


def test_a_script_cannot_read_the_portals_pages(app: Page) -> None:
    for path in ("/auth/", "/auth/account", "/auth/login", "/auth/logout"):
        status, text = app.evaluate(
            "path => fetch(path, {headers: {Accept: 'text/html'}}).then(async r => [r.status, await r.text()])",
            path,
        )
        assert status == 403
        assert "token" not in text


def test_a_script_cannot_post_to_the_portal(demo, app: Page) -> None:
    for mode in ("no-cors", "cors", "same-origin"):
        for kind, body in (
            ("application/x-www-form-urlencoded", "id=all&action=stop&agent=alice"),
            ("application/json", '{"id": "all", "action": "stop", "agent": "alice"}'),
        ):
            for path in ("/auth/logout", "/auth/agents", "/auth/account/sessions", "/auth/account/tokens"):
                if mode == "no-cors" and "json" in kind:
                    continue
                status = app.evaluate(
                    """([path, mode, kind, body]) => fetch(path, {method: 'POST', mode, body,
                       headers: {'Content-Type': kind, 'Accept': 'application/json'}}).then(r => r.status)""",
                    [path, mode, kind, body],
                )
                assert status == 403, (mode, kind, path)
    app.reload()
    expect(app.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")


def test_a_frame_shows_nothing_of_the_portal(app: Page) -> None:
    for path in ("/auth/", "/auth/login", "/auth/account"):
        shown = app.evaluate(
            """path => new Promise(done => { const frame = document.createElement('iframe'); frame.src = path;
               frame.onload = () => { let text = ''; try { text = frame.contentDocument.body.innerText; } catch {}
               done(text); }; document.body.append(frame); setTimeout(() => done(''), 3000); })""",
            path,
        )
        assert "Sign" not in shown
        assert "token" not in shown


def test_a_window_that_an_app_opens_gives_no_handle_to_the_portal(app: Page) -> None:
    with app.context.expect_page() as opened:
        app.evaluate("window.portal = window.open('/auth/account', 'portal'); undefined")
    expect(opened.value.get_by_role("heading", name="Account")).to_be_visible()
    app.wait_for_timeout(300)
    seen = app.evaluate(
        "(() => { try { return portal.closed ? '' : portal.document.body.innerText; } catch { return ''; } })()"
    )
    assert seen == ""
    assert opened.value.evaluate("window.opener") is None


def test_no_service_worker_of_an_app_covers_the_portal(app: Page) -> None:
    register = """([script, scope]) => navigator.serviceWorker.register(script, {scope})
        .then(() => 'registered', error => String(error))"""
    assert app.evaluate(register, ["/demo.js", "/"]) != "registered"
    assert app.evaluate(register, ["/demo.js", "/auth/"]) != "registered"


def test_an_app_cannot_see_or_set_the_portals_cookies(demo, app: Page) -> None:
    assert app.evaluate("document.cookie") == ""
    token = next(cookie["value"] for cookie in app.context.cookies() if cookie["name"] == "dispatcher")
    app.evaluate("document.cookie = 'dispatcher=' + 'x'.repeat(43) + '; path=/'")
    app.evaluate("document.cookie = 'dispatcher=' + 'x'.repeat(43) + '; path=/auth'")
    kept = [cookie for cookie in app.context.cookies() if cookie["name"] == "dispatcher" and cookie["path"] == "/"]
    assert [cookie["value"] for cookie in kept] == [token]
    app.goto(demo.url)
    expect(app.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")


@pytest.mark.parametrize("where", ["path=/auth", "path=/auth/account", "path=/auth/; max-age=99999"])
def test_an_app_cannot_lock_its_user_out_of_the_portal(demo, app: Page, where: str) -> None:
    """A second session cookie makes both count as none; the portal removes what is not its own."""
    app.evaluate("text => { document.cookie = text; }", f"dispatcher={'x' * 43}; {where}")
    app.goto(f"{demo.url}/auth/account")
    app.get_by_role("link", name="Continue").click()
    expect(app.get_by_role("heading", name="Account")).to_be_visible()
    assert len([cookie for cookie in app.context.cookies() if cookie["name"] == "dispatcher"]) == 1


def test_cookies_above_the_limit_lock_nobody_out(demo, app: Page) -> None:
    """A browser sends every cookie of the host with every request, the sign-in's and the portal's too."""
    app.evaluate("""() => { for (let i = 0; i < 80; i++) document.cookie = `big${i}=${'x'.repeat(1000)}; path=/`;
        for (let i = 0; i < 80; i++) document.cookie = `deep${i}=${'x'.repeat(1000)}; path=/auth`; }""")
    for path, heading in (("/auth/account", "Account"), ("/", "Notebook of alice")):
        for _ in range(3):  # an answer expires a hundred cookies at most, and those of a path when it is asked for
            answer = app.goto(demo.url + path)
            if answer.status == 200:
                break
            assert answer.status == 431
            expect(app.get_by_role("heading", level=1)).to_have_text("Too many cookies for this address")
            expect(app.get_by_text("Load the page again")).to_be_visible()
        expect(app.get_by_role("heading", name=heading)).to_be_visible()
    assert "dispatcher" in {cookie["name"] for cookie in app.context.cookies()}, "still signed in"


def test_the_next_person_finds_nothing_of_the_last(demo, app: Page) -> None:
    app.evaluate("localStorage.setItem('secret', 'of alice'); document.cookie = 'theirs=of-alice; path=/'")
    app.evaluate("caches.open('c').then(c => c.put('/x', new Response('of alice')))")
    app.goto(f"{demo.url}/auth/")
    app.get_by_role("button", name="Sign out").click()
    expect(app.get_by_text("You are signed out")).to_be_visible()
    app.get_by_label("Name").fill("bob")
    app.get_by_label("Password").fill(PASSWORD)
    app.get_by_role("button", name="Sign in").click()
    expect(app.get_by_role("heading", level=1)).to_contain_text("Notebook of bob")
    assert app.evaluate("localStorage.getItem('secret')") is None
    assert app.evaluate("document.cookie") == ""
    assert app.evaluate("caches.keys()") == []
    app.go_back()
    app.wait_for_timeout(300)
    assert "of alice" not in app.inner_text("body")


class Evil(http.server.BaseHTTPRequestHandler):
    """Another site, with a form that sends itself to the portal."""

    target = ""

    def do_GET(self) -> None:  # noqa: N802
        body = f"""<form method=post action="{self.target}/auth/login"><input name=user value=bob>
            <input name=password value="{PASSWORD}"><input name=token value=x></form>
            <script>document.forms[0].submit()</script>""".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def evil(demo):
    Evil.target = demo.url
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("host", ["evil.localhost", "127.0.0.1"])
def test_another_site_cannot_sign_anybody_in(demo, person, evil: int, host: str) -> None:
    page = person()
    page.goto(f"{demo.url}/auth/login")
    page.goto(f"http://{host}:{evil}/")
    expect(page.get_by_text("Not allowed")).to_be_visible()
    expect(page.get_by_text("It comes from another site")).to_be_visible()
    assert not any(cookie["name"] == "dispatcher" for cookie in page.context.cookies())
    page.get_by_role("link", name="My apps").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
