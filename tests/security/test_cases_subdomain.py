"""Hosts of agents that are siblings: nobody gets into another's by a cookie, a page, a link or an upgrade."""

from __future__ import annotations

import time
from urllib.parse import parse_qs, urlsplit

import pytest

from dispatcher.plugin import names
from tests.support.cases_site import Site, head_of
from tests.support.installation import until
from tests.support.portal_manager import Browser, make

pytestmark = [pytest.mark.bubblewrap, pytest.mark.xdist_group("cases")]
HTML = {
    "Accept": "text/html",
    "Sec_Fetch_Mode": "navigate",
    "Sec_Fetch_Dest": "document",
    "Sec_Fetch_Site": "none",
}


class Person:
    """A browser by hand: cookies by host."""

    def __init__(self, site, name):
        self.site, self.jars = site, {}
        self.portal = f"apps.test:{site.port}"
        self.own = f"{names.key(name)}.{self.portal}"
        answer = site.web(
            "POST", "/auth/login", {"user": name, "password": "correct horse battery"},
            Host=self.portal, Accept="application/json", Origin=f"http://{self.portal}",
        )  # fmt: skip
        assert answer.status == 200, answer.body
        self.keep(self.portal, answer)

    def keep(self, host, answer):
        jar = self.jars.setdefault(host, {})
        for line in answer.headers.get_all("Set-Cookie") or []:
            name, _, value = line.partition(";")[0].partition("=")
            jar[name] = value

    def cookie(self, host):
        return "; ".join(f"{name}={value}" for name, value in self.jars.get(host, {}).items())

    def open(self, url, **headers):
        host, target = urlsplit(url).netloc, url.partition("://")[2].partition("/")[2]
        answer = self.site.web("GET", f"/{target}", Host=host, Cookie=self.cookie(host), **(headers or HTML))
        self.keep(host, answer)
        return answer

    def link(self):
        """Return the link that carries this person's sign-in over to the own host, not yet followed."""
        answer = self.open(f"http://{self.own}/auth/login?next=/")
        answer = self.open(answer.headers["Location"])
        return answer.headers["Location"]

    def enter(self):
        assert self.open(self.link()).status == 303
        until("the app answers", lambda: self.open(f"http://{self.own}/", Accept="*/*").status == 200)
        return self


@pytest.fixture(scope="module")
def site():
    with Site(proxy='routing = "subdomain"\npublic_url = "http://apps.test:{port}"') as site:
        for name in ("alice", "bob"):
            site.add(name)
        yield site


@pytest.fixture(scope="module")
def alice(site):
    return Person(site, "alice").enter()


@pytest.fixture(scope="module")
def bob(site):
    return Person(site, "bob").enter()


def seen(person):
    return person.open(f"http://{person.own}/seen", Accept="*/*").json()["seen"]


def test_neither_the_portals_cookie_nor_that_of_ones_own_host_opens_another_host(site, alice, bob):
    before = len(seen(bob))
    nobody = f"{names.key('nobody')}.apps.test:{site.port}"
    for cookie in (alice.cookie(alice.portal), alice.cookie(alice.own)):
        tries = []
        for host in (bob.own, nobody):
            for headers in ({}, HTML, {"Accept": "application/json"}):
                answer = site.web("GET", "/mine", Host=host, Cookie=cookie, **headers)
                tries.append((answer.status, answer.body.replace(host.encode(), b"HOST")))
        assert tries[:3] == tries[3:], "missing and forbidden are alike"
        assert {status for status, _ in tries} <= {303, 401, 403, 404}
        sock, head = site.upgrade("/ws", cookie, f"Origin: http://{bob.own}", host=bob.own)
        sock.close()
        assert head.startswith(b"HTTP/1.1 40")
    assert len(seen(bob)) == before + 1


ORIGINS = [
    "http://{bob}",
    "http://apps.test:{port}",
    "http://evil.test",
    "null",
    "https://{alice}",
    "http://{alice}.evil.test",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_another_origin_opens_no_socket_and_changes_nothing(site, alice, bob, origin):
    origin = origin.format(alice=alice.own, bob=bob.own, port=site.port)
    before = len(seen(alice))
    cookie = alice.cookie(alice.own)
    sock, head = site.upgrade("/ws", cookie, f"Origin: {origin}", host=alice.own)
    sock.close()
    assert head.startswith(b"HTTP/1.1 403 ")
    for method in ("POST", "PUT", "DELETE"):
        answer = site.web(method, "/change", Host=alice.own, Cookie=cookie, Origin=origin)
        assert answer.status == 403
    assert len(seen(alice)) == before + 1
    sock, head = site.upgrade("/ws", cookie, f"Origin: http://{alice.own}", host=alice.own)
    sock.close()
    assert head.startswith(b"HTTP/1.1 101 ")
    assert site.web("POST", "/change", Host=alice.own, Cookie=cookie, Origin=f"http://{alice.own}").status == 200


@pytest.mark.parametrize("token", ["h2c", "websocket, h2c", "TLS/1.0", "HTTP/2.0"])
def test_no_other_protocol_is_switched_to(site, alice, token):
    lines = (
        "Connection: Upgrade, HTTP2-Settings",
        f"Upgrade: {token}",
        "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    )
    with site.open("/", alice.cookie(alice.own), *lines, host=alice.own) as sock:
        head = head_of(sock)
        assert not head.startswith(b"HTTP/1.1 101 ")
        if head.startswith(b"HTTP/1.1 200 "):
            body = sock.recv(65536).lower()
            assert b"h2c" not in body
            assert b"http2-settings" not in body


def test_a_hand_over_link_is_not_valid_for_another_browser(site):
    victim, attacker = Person(site, "alice"), Person(site, "bob")
    link = attacker.link()
    answer = victim.open(link)  # nobody is signed in as the attacker
    assert answer.status == 403
    assert "dispatcher" not in victim.jars.get(attacker.own, {})
    assert attacker.open(link).status in {403, 303}
    link = victim.link()
    assert "code" in parse_qs(urlsplit(link).query)
    assert attacker.open(link).status == 403  # nor does the attacker get in with the victim's link
    assert "dispatcher" not in attacker.jars.get(victim.own, {})
    answer = site.web("GET", "/", Host=victim.own, Cookie=attacker.cookie(victim.own))
    assert answer.status == 401


def test_a_form_that_was_open_for_two_hours_works(monkeypatch):
    app, _ = make()
    browser = Browser(app)
    pages = [browser.get("/auth/login?next=/a"), browser.get("/auth/login?next=/b")]
    line = next(line for line in pages[0].headers.getlist("Set-Cookie") if line.startswith("dispatcher-form="))
    assert "Max-Age" not in line
    assert "Expires" not in line
    real, steady = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    monkeypatch.setattr(time, "monotonic", lambda: steady() + 7200)
    for page, target in zip(pages, ("/a", "/b"), strict=True):
        answer = browser.submit(page, "/login", {"user": "alice", "password": "correct horse"})
        assert (answer.status, answer.location) == (303, target)
