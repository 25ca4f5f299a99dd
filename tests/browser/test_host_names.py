"""By a host name over plain HTTP, where browsers send no fetch metadata; and over HTTPS behind nginx."""

from __future__ import annotations

import subprocess

import pytest
from playwright.sync_api import Page, expect

from tests.browser.test_waiting import SLOW, apps
from tests.conftest import ROOT
from tests.support.certificates import Authority
from tests.support.installation import PASSWORD, until

pytestmark = pytest.mark.browser
PHONE = {"viewport": {"width": 390, "height": 760}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def site(make_site):
    site = make_site()
    site.url = f"http://apps.test:{site.port}"
    return site


NGINX = """
daemon off; pid {base}/nginx.pid; error_log {base}/nginx.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {base}/body; proxy_temp_path {base}/proxy; fastcgi_temp_path {base}/f; uwsgi_temp_path {base}/u;
  scgi_temp_path {base}/s;
  {documented}
}}
"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory):
    """Start nginx with the file of examples/ in front of a port; returns its URL by the name apps.test."""
    example = (ROOT / "examples/nginx.conf").read_text(encoding="utf-8")
    started = []

    def start(port: int, to: int, *, without: str = "no such line") -> str:
        base = tmp_path_factory.mktemp("nginx")
        cert, key = Authority(base).issue("apps.test", ["apps.test"])
        text = example
        for there, here in (
            ("listen 443", f"listen 127.0.0.1:{port}"),
            ("/etc/ssl/apps.example.org.pem", str(cert)),
            ("/etc/ssl/apps.example.org.key", str(key)),
            ("127.0.0.1:8080", f"127.0.0.1:{to}"),
            ("apps.example.org", "apps.test"),
        ):
            assert there in text
            text = text.replace(there, here)
        text = "\n".join(line for line in text.splitlines() if without not in line)
        (base / "nginx.conf").write_text(NGINX.format(base=base, documented=text))
        process = subprocess.Popen(["nginx", "-c", base / "nginx.conf", "-p", base, "-e", base / "nginx.log"])
        started.append(process)
        until("nginx serves", lambda: (base / "nginx.pid").exists())
        return f"https://apps.test:{port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


def sign_in(page: Page, name: str = "alice") -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()


@pytest.mark.parametrize("settings", [{}, PHONE], ids=["desktop", "phone"])
def test_a_whole_visit(site, person, settings) -> None:
    page = person(**settings)
    sent = []
    page.on(
        "request", lambda request: sent.append(request.all_headers()) if request.is_navigation_request() else None
    )
    page.goto(f"{site.url}/?view=all")
    sign_in(page, " alice ")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    assert page.url == f"{site.url}/?view=all"
    assert not any(name.startswith("sec-fetch") for fields in sent for name in fields), "this tests nothing new"
    page.goto(f"{site.url}/auth/")
    expect(page.get_by_role("heading", name="My apps")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("You are signed out")).to_be_visible()
    for _ in range(2):
        page.go_back()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert "alice" not in page.inner_text("body")


def test_a_sleeping_app_can_be_woken_by_hand(site, person) -> None:
    page = person()
    page.goto(f"{site.url}/auth/")
    sign_in(page, "bob")
    expect(page.get_by_role("heading", name="My apps")).to_be_visible()
    for start in ("/auth/", "/auth/waiting?next=/%3Fview%3Dall"):
        site.admin("PUT", "/agents/bob/state?wait=20", {"state": "suspended"})
        page.goto(site.url + start)
        page.get_by_role("button", name="Start").click()
        until("bob runs", lambda: site.admin("GET", "/agents/bob/state").json()["state"] == "running")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of bob")
    assert page.url == f"{site.url}/?view=all"


def test_a_fragment_survives_the_sign_in_and_the_waiting_page(site_with, person) -> None:
    site = site_with(apps(SLOW), people=("alice",), proxy='hold = "300ms"')
    page = person()
    address = f"http://apps.test:{site.port}/?view=all#cell-7"
    page.goto(address)
    sign_in(page)
    expect(page.get_by_text("This page opens the app as soon as it is ready")).to_be_visible()
    assert page.url == address
    expect(page.get_by_role("heading", name="Notebook")).to_be_visible(timeout=15_000)
    assert page.url == address


def test_cookies_that_are_switched_off_are_named(site, person) -> None:
    page = person()
    page.goto(f"{site.url}/auth/login")
    page.context.clear_cookies()
    sign_in(page)
    expect(page.get_by_role("alert")).to_contain_text("Your browser sent no cookie")
    expect(page.get_by_role("alert")).to_contain_text("llow cookies for this site")


@pytest.mark.parametrize("settings", [{}, PHONE], ids=["desktop", "phone"])
def test_https_behind_nginx(make_site, nginx, person, free_port, settings) -> None:
    url = f"https://apps.test:{free_port}"
    site = make_site(proxy=f'public_url = "{url}"\ntrusted_proxies = ["127.0.0.1"]')
    nginx(free_port, site.port)
    page = person(ignore_https_errors=True, **settings)
    page.goto(f"{url}/?view=all#cell-7")
    sign_in(page)
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    expect(page.get_by_text("Live over a WebSocket")).to_be_visible()
    assert page.url == f"{url}/?view=all#cell-7"
    assert {cookie["name"] for cookie in page.context.cookies()} >= {"__Host-dispatcher"}
    page.goto(f"{url}/auth/")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("You are signed out")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    plain = person(**settings)
    plain.goto(f"http://apps.test:{site.port}/auth/login")
    sign_in(plain)
    expect(plain.get_by_role("alert")).to_contain_text("This page was opened without encryption")
    expect(plain.get_by_role("alert")).to_contain_text(f"pen {url}")


def test_a_front_proxy_that_hides_https_is_named(site, nginx, person, free_port) -> None:
    url = nginx(free_port, site.port, without="X-Forwarded-Proto")
    page = person(ignore_https_errors=True)
    page.goto(f"{url}/auth/login")
    sign_in(page)
    expect(page.locator("main")).to_contain_text("X-Forwarded-Proto: https")
