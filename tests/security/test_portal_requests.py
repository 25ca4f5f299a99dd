"""Attacks on the portal's forms, targets, cookies and pages (the lines of docs on what may go wrong), one by one."""

from __future__ import annotations

import re
import time

import pytest
from markupsafe import escape

from dispatcher.plugin.errors import ManagerUnreachable, NotFound
from tests.support.portal_manager import HTML, Browser, Manager, Program, agent, digest, make

LOGIN = '{"user": "alice", "password": "correct horse"}'
OWN = ("dispatcher", "dispatcher-device", "dispatcher-nonce", "dispatcher-form")
EVIL = [
    "//evil.example",
    "///evil.example",
    "////evil.example/%2e%2e",
    "/\\evil.example",
    "\\\\evil.example",
    "\\/evil.example",
    "/\t/evil.example",
    "/\n/evil.example",
    "/\r/evil.example",
    "\t//evil.example",
    " //evil.example",
    "/%09/evil.example",
    "/%0a/evil.example",
    "/%20/evil.example",
    "/%a0/evil.example",
    "/%2fevil.example",
    "/%2Fevil.example",
    "/%5cevil.example",
    "/%5C%5Cevil.example",
    "/%252fevil.example",
    "/%25252fevil.example",
    "/%2525252525252fevil.example",
    "/%00/evil.example",
    "https:evil.example",
    "https:/evil.example",
    "https://evil.example",
    "https://portal.test//evil.example",
    "https://portal.test@evil.example",
    "http://portal.test:8080/",
    "javascript:alert(1)",
    "data:text/html,x",
    "evil.example",
    "?next=//evil.example",
    "#//evil.example",
    "",
    "/\x00",
    "/x\r\nSet-Cookie: dispatcher=x",
    "/x\u2028y",
    "/x\\..\\..\\evil",
    "/" + "x" * 9000,
]


@pytest.fixture
def portal():
    return make()


def stays_here(location: str) -> bool:
    """Whether every reading of a Location leads to the own origin."""
    return (
        re.match(r"/(?![/\\])", location) is not None
        and not re.search(r"[\x00-\x20\\\x7f-\uffff]", location)
        and not re.match(r"/(%[0-2][0-9a-fA-F]|%7f|%a0)*(%2f|%5c|/|\\)", location, re.IGNORECASE)
    )


class TestOpenRedirect:
    @pytest.mark.parametrize("target", EVIL)
    def test_signing_in_stays_on_the_own_origin(self, portal, target: str) -> None:
        app, _ = portal
        browser = Browser(app)
        page = browser.get("/auth/login")
        page = browser.submit(page, "/login", {"user": "alice", "password": "correct horse", "next": target})
        assert page.status == 303
        assert page.location == "/"

    @pytest.mark.parametrize("target", EVIL)
    def test_other_redirects_stay_on_the_own_origin(self, portal, target: str) -> None:
        app, manager = portal
        browser = Browser(app)
        shown = browser.client.get("/auth/login", query_string={"next": target}, headers=browser.headers("GET"))
        assert 'name="next" value="/"' in shown.get_data(as_text=True)
        browser.sign_in()
        page = browser.get("/auth/")
        fields = {"action": "open", "next": target, "agent": "alice"}
        assert stays_here(browser.submit(page, "/agents", fields).location)
        assert stays_here(browser.submit(page, "/agents", fields | {"action": "start"}).location)
        answer = Program(app).post("/auth/login", {"user": "alice", "password": "correct horse", "next": target})
        assert answer.json["next"] == "/"
        manager.agents["alice"] |= {"state": "starting"}
        header = target.encode().decode("latin-1")
        if not re.search(r"[\r\n\x00]", header):
            page = browser.get("/auth/waiting", X_Dispatcher_Agent="alice", X_Dispatcher_Target=header)
            assert 'data-target="/"' in page.source

    def test_the_judge_of_this_test_knows_bad_from_good(self) -> None:
        assert stays_here("/lab?x=//y")
        assert not any(stays_here(bad) for bad in ("//e", "/\\e", "https://e", "/%2fe", "/%09/e", "/a b"))


CROSS = [
    ("another site", {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"}),
    ("another origin, an old browser", {"Origin": "https://evil.example", "Sec_Fetch_Site": None}),
    ("a sibling host", {"Origin": "http://bob.portal.test:8080", "Sec_Fetch_Site": "same-site"}),
    ("another port", {"Origin": "http://portal.test:9090", "Sec_Fetch_Site": "same-site"}),
    ("another scheme", {"Origin": "https://portal.test:8080", "Sec_Fetch_Site": "cross-site"}),
    ("a sandboxed frame", {"Origin": "null", "Sec_Fetch_Site": "cross-site"}),
    ("a sandboxed frame, an old browser", {"Origin": "null", "Sec_Fetch_Site": None}),
    ("fetch with no-cors", {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "empty"}),
    ("fetch of an app of the same origin", {"Sec_Fetch_Mode": "cors", "Sec_Fetch_Dest": "empty"}),
    ("fetch with same-origin", {"Sec_Fetch_Mode": "same-origin", "Sec_Fetch_Dest": "empty"}),
    ("a frame of an app of the same origin", {"Sec_Fetch_Dest": "iframe"}),
    ("an embedded object", {"Sec_Fetch_Dest": "object"}),
]


class TestForgery:
    @pytest.mark.parametrize(("why", "headers"), CROSS)
    def test_a_form_that_is_not_ours_is_refused_even_with_a_token(self, portal, why: str, headers) -> None:
        app, manager = portal
        browser = Browser(app)
        login = browser.get("/auth/login")
        fields = {"user": "alice", "password": "correct horse"}
        assert browser.submit(login, "/login", fields, **headers).status == 403, why
        assert not manager.rows
        browser.sign_in()
        calls = len(manager.calls)
        pages = {path: browser.get(path) for path in ("/auth/", "/auth/logout", "/auth/account")}
        for path, action, more in (
            ("/auth/", "/agents", {"action": "stop"}),
            ("/auth/logout", "/logout", {}),
            ("/auth/account", "/account/sessions", {"id": "all"}),
            ("/auth/account", "/account/password", {"password": "correct horse", "new_password": "12345678"}),
        ):
            assert browser.submit(pages[path], action, more, **headers).status == 403, (why, action)
        assert {name for name, *_ in manager.calls[calls:]} <= {"lookup", "my_agents", "my_sessions"}
        assert len(manager.rows) == 1

    @pytest.mark.parametrize("token", ["", "x", None])
    def test_no_or_a_made_up_token(self, portal, token) -> None:
        app, manager = portal
        browser = Browser(app)
        fields = browser.get("/auth/login").form("/login")["fields"] | {
            "user": "alice",
            "password": "correct horse",
        }
        fields = {name: value for name, value in fields.items() if name != "token"}
        page = browser.post("/auth/login", fields | ({} if token is None else {"token": token}))
        assert page.status == 403
        assert not manager.rows
        browser.sign_in()
        for action in ("agents", "logout", "account/sessions", "account/password"):
            page = browser.post(f"/auth/{action}", {"agent": "alice", "action": "stop", "id": "all"})
            assert page.status == 403, action
        assert len(manager.rows) == 1

    def test_a_token_of_another_browser(self, portal) -> None:
        app, manager = portal
        attacker, victim = Browser(app), Browser(app)
        fields = attacker.get("/auth/login").form("/login")["fields"]
        victim.get("/auth/login")
        page = victim.post("/auth/login", fields | {"user": "bob", "password": "battery staple"})
        assert page.status == 403
        assert not manager.rows

    def test_a_token_of_another_session_or_purpose(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in("bob", "battery staple")
        old = browser.get("/auth/").form("/agents")["fields"]
        login = browser.get("/auth/login").form("/login")["fields"]
        browser.sign_in()
        calls = len(manager.calls)
        for fields in (old, login):
            page = browser.post("/auth/agents", fields | {"agent": "alice", "action": "stop"})
            assert page.status == 403
            assert "This page was out of date" in page.text
            assert 'href="/auth/"' in page.source
        assert not any(name == "my_state" for name, *_ in manager.calls[calls:])

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
            {"Sec-Fetch-Mode": "no-cors"},
            {"Sec-Fetch-Site": "cross-site"},
        ],
    )
    def test_json_is_for_programs_and_not_for_scripts_of_pages(self, portal, headers) -> None:
        app, manager = portal
        program = Program(app)
        body = {"user": "alice", "password": "correct horse"}
        assert program.post("/auth/login", body, **headers).status == 403
        assert not manager.rows

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    def test_json_with_a_forms_content_type(self, portal, kind: str) -> None:
        """What another site's page may send without asking is never read as JSON."""
        app, manager = portal
        response = app.test_client().post(
            "/auth/login",
            data='{"user": "alice", "password": "correct horse"}',
            headers={"Content-Type": kind, "Accept": "application/json"},
        )
        assert response.status_code == 403
        assert not manager.rows

    @pytest.mark.parametrize("body", ["user=alice&password=correct+horse", "[1]", "{", "1" * 5000])
    @pytest.mark.parametrize("accept", ["text/html", "application/json"])
    def test_json_that_is_none_is_a_bad_request_and_no_wrong_password(
        self, portal, body: str, accept: str
    ) -> None:
        app, manager = portal
        response = app.test_client().post(
            "/auth/login", data=body, headers={"Content-Type": "application/json", "Accept": accept}
        )
        assert response.status_code == 400
        assert "Name and password" not in response.text
        assert not manager.rows

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (LOGIN.encode("utf-8-sig"), 400),
            (LOGIN.encode("utf-16"), 400),
            (LOGIN.encode("utf-16-le"), 400),
            (LOGIN.encode("utf-32-be"), 400),
            (LOGIN.replace("alice", "al\xefce").encode("latin-1"), 400),
            (LOGIN.replace('"alice"', "NaN").encode(), 400),
            (LOGIN.replace('"alice"', "-Infinity").encode(), 400),
            (LOGIN.replace('"alice"', "9" * 60_000).encode(), 400),
            (b"[" * 60_000, 400),
            (b'{"a":' * 12_000, 400),
            (b"\x00" * 100, 400),
            (LOGIN.replace("alice", "\\ud800").encode(), 403),
            (LOGIN.replace('"alice"', "1e999").encode(), 403),  # no name
        ],
        ids=[
            "bom",
            "utf-16",
            "utf-16-le",
            "utf-32",
            "latin-1",
            "nan",
            "infinity",
            "digits",
            "lists",
            "objects",
            "nul",
        ]
        + ["surrogate", "float"],
    )
    def test_json_is_utf_8_and_nothing_else(self, portal, body: bytes, status: int) -> None:
        """The codecs of other encodings cannot be imported once privileges are dropped."""
        app, manager = portal
        response = app.test_client().post(
            "/auth/login", data=body, headers={"Content-Type": "application/json", "Accept": "application/json"}
        )
        assert response.status_code == response.json["status"] == status
        assert not manager.rows

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_get_changes_nothing(self, portal, method: str) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        for path in ("/auth/logout", "/auth/agents?agent=alice&action=stop", "/auth/account/sessions?id=all"):
            browser.client.open(path, method=method, base_url=browser.origin, headers=browser.headers("GET"))
        assert len(manager.rows) == 1
        assert {name for name, *_ in manager.calls} == {"login", "lookup", "sign_in_methods"}

    def test_an_own_origin_by_another_name(self) -> None:
        app, _ = make(public_url="https://apps.example")
        browser = Browser(app, "http://inner.test:8080")
        page = browser.get("/auth/login")
        fields = {"user": "alice", "password": "correct horse"}
        assert browser.submit(page, "/login", fields, Origin="https://apps.example").status == 303
        assert browser.submit(page, "/login", fields, Origin="https://evil.example").status == 403

    @pytest.mark.parametrize(
        ("seen", "public", "sender", "site"),
        [
            ("https://apps.example:443", "", "https://apps.example", "same-origin"),
            ("http://apps.example:80", "", "http://apps.example", None),
            ("http://10.0.0.7:8080", "https://apps.example:443/", "https://apps.example", "same-origin"),
            ("http://apps.example", "", "null", "same-origin"),
        ],
    )
    def test_one_origin_has_many_spellings(self, seen, public, sender, site) -> None:
        app, _ = make(public_url=public)
        browser = Browser(app, seen)
        none = dict.fromkeys(("Sec_Fetch_Site", "Sec_Fetch_Mode", "Sec_Fetch_Dest", "Sec_Fetch_User"))
        headers = {"Sec_Fetch_Site": site} if site else none
        page = browser.get("/auth/login")
        token = page.form("/login")["fields"]
        name = "__Host-dispatcher-form" if public else "dispatcher-form"
        cookie = next(line.partition(";")[0] for line in page.headers.getlist("Set-Cookie") if name in line)
        answer = app.test_client(use_cookies=False).post(
            "/auth/login",
            data=token | {"user": "alice", "password": "correct horse"},
            base_url=seen,
            headers=browser.headers("POST", Origin=sender, Cookie=cookie, **headers),
        )
        assert answer.status_code == 303

    @pytest.mark.parametrize(
        ("seen", "sender", "site", "fields"),
        [
            ("http://apps.example", "https://apps.example", "same-origin", ["X-Forwarded-Proto: https"]),
            ("http://apps.example", "https://apps.example", None, ["X-Forwarded-Proto: https"]),
            ("https://10.0.0.7", "https://apps.example", "same-origin", ["X-Forwarded-Host: apps.example"]),
            ("http://apps.example", "http://apps.example:8080", None, ["X-Forwarded-Host: apps.example:8080"]),
            (
                "http://10.0.0.7:8080",
                "https://apps.example:8443",
                "same-origin",
                ["X-Forwarded-Proto: https", "X-Forwarded-Host: apps.example:8443"],
            ),
        ],
    )
    def test_a_refusal_names_what_the_front_proxy_must_send(self, portal, seen, sender, site, fields) -> None:
        app, _ = portal
        browser = Browser(app, seen)
        page = browser.submit(
            browser.get("/auth/login"), "/login", {"user": "alice"}, Origin=sender, Sec_Fetch_Site=site
        )
        assert page.status == 403
        for text in (*fields, "proxy.trusted_proxies", "proxy.public_url"):
            assert text in page.text

    @pytest.mark.parametrize(
        "sender", ["https://evil.example", "null", "http://[", "x", "http://portal.test:99999"]
    )
    def test_a_foreign_page_gets_no_advice(self, portal, sender: str) -> None:
        app, _ = portal
        browser = Browser(app)
        page = browser.submit(
            browser.get("/auth/login"), "/login", {"user": "alice"}, Origin=sender, Sec_Fetch_Site="cross-site"
        )
        assert page.status == 403
        assert "proxy" not in page.text

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_a_page_over_http_where_https_is_meant_says_so(self, scheme: str) -> None:
        """The edge takes a trusted proxy that states no scheme for one that ends TLS."""
        app, _ = make(public_url="https://apps.example")
        browser = Browser(app, "http://apps.example")
        page = browser.get("/auth/login")
        fields = page.form("/login")["fields"] | {"user": "alice", "password": "correct horse"}
        # The browser keeps no cookie of a page without encryption that is named __Host-.
        answer = app.test_client(use_cookies=False).post(
            "/auth/login",
            data=fields,
            base_url=browser.origin,
            headers=browser.headers("POST", X_Forwarded_Proto=scheme),
        )
        text = answer.get_data(as_text=True)
        assert answer.status_code == 403
        assert "opened without encryption" in text
        assert "Open https://apps.example" in text

    @pytest.mark.parametrize("path", ["/auth//login", "/auth///", "/auth//account/password", "//auth/login"])
    def test_no_redirect_to_what_the_host_header_says(self, portal, path: str) -> None:
        app, _ = portal
        answer = app.test_client().get(path, headers={"Accept": HTML, "Host": "evil.example"})
        assert answer.status_code in {404, 405}
        assert "Location" not in answer.headers

    def test_a_browser_without_fetch_metadata_signs_in(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        none = dict.fromkeys(("Sec_Fetch_Site", "Sec_Fetch_Mode", "Sec_Fetch_Dest", "Sec_Fetch_User"))
        page = browser.get("/auth/login", **none)
        fields = {"user": "alice", "password": "correct horse"}
        assert browser.submit(page, "/login", fields, **none).status == 303


class TestTabsAndTime:
    def test_two_tabs_sign_in_one_after_the_other(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        first, second = browser.get("/auth/login?next=/a"), browser.get("/auth/login?next=/b")
        fields = {"user": "alice", "password": "correct horse"}
        assert browser.submit(first, "/login", fields).location == "/a"
        assert browser.submit(second, "/login", fields).location == "/b"
        assert list(manager.rows) == [digest(browser.cookie())]

    def test_a_form_outlives_the_portal(self) -> None:
        app, manager = make()
        browser = Browser(app)
        page = browser.get("/auth/login")
        again, _ = make(manager)
        later = Browser(again)
        later.set_cookie("dispatcher-form", browser.cookie("dispatcher-form"))
        assert later.submit(page, "/login", {"user": "alice", "password": "correct horse"}).status == 303

    def test_a_form_whose_cookie_is_gone_works_at_the_second_try(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        page = browser.get("/auth/login?next=/lab")
        fields = {"user": "alice", "password": "correct horse"}
        fresh = Browser(app)
        page = fresh.submit(page, "/login", fields)
        assert page.status == 403
        assert "Your browser sent no cookie" in page.text
        assert page.form("/login")["fields"]["user"] == "alice"
        assert fresh.submit(page, "/login", fields).location == "/lab"


class TestSessions:
    def test_fixation(self, portal) -> None:
        app, manager = portal
        attacker = Browser(app)
        attacker.sign_in("bob", "battery staple")
        planted = attacker.cookie()
        victim = Browser(app)
        victim.set_cookie("dispatcher", planted)
        victim.sign_in()
        assert victim.cookie() != planted
        assert manager.rows[digest(victim.cookie())]["user"] == "alice"
        assert digest(planted) not in manager.rows

    def test_two_session_cookies_are_none(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        browser.sign_in()
        token = browser.cookie()
        headers = browser.headers("GET") | {"Cookie": f"dispatcher={token}; dispatcher={token}"}
        client = app.test_client(use_cookies=False)
        assert client.get("/auth/", headers=headers).status_code == 303
        headers["Cookie"] = f"dispatcher={token}"
        assert client.get("/auth/", headers=headers).status_code == 200

    def test_what_stands_beside_the_session_cookie_is_expired(self, portal) -> None:
        """Without HTTPS an app's page can set a second one; both count as none, until it is gone."""
        app, _ = portal
        browser = Browser(app)
        browser.sign_in()
        headers = browser.headers("GET") | {"Cookie": f"dispatcher={browser.cookie()}; dispatcher={'x' * 43}; a=1"}
        response = app.test_client(use_cookies=False).get(
            "/auth/account", base_url=browser.origin, headers=headers
        )
        assert response.status_code == 303
        gone = {tuple(part.strip() for part in line.split(";")) for line in response.headers.getlist("Set-Cookie")}
        names = {parts[0] for parts in gone}
        assert names == {"dispatcher="}
        assert all("Max-Age=0" in parts for parts in gone)
        places = {tuple(part for part in parts if part.startswith(("Path=", "Domain="))) for parts in gone}
        assert {("Path=/auth",), ("Path=/auth/",), ("Path=/auth/account",)} <= places
        assert {("Domain=portal.test", "Path=/"), ("Domain=test", "Path=/")} <= places
        assert ("Path=/",) not in places, "that one is ours"

    def test_expiring_doubled_cookies_costs_little_whatever_path_host_and_names_are_sent(self, portal) -> None:
        """It cost segments x labels x names: 1.2 kB took 14 s, without a sign-in."""
        app, _ = portal
        names = [prefix + name for prefix in ("", "__Host-") for name in OWN]
        headers = {"Accept": HTML, "Cookie": "; ".join(f"{name}=x; {name}=y" for name in names)}
        began = time.process_time()
        response = app.test_client(use_cookies=False).get(
            "/auth" + "/a" * 200, base_url=f"http://{'a.' * 200}test", headers=headers
        )
        assert time.process_time() - began < 2
        assert len(response.headers.getlist("Set-Cookie")) < 300

    @pytest.mark.parametrize("value", ["", "x", "a b", "é" * 40, "x" * 5000, "../../etc/passwd", '"quoted"'])
    def test_odd_cookies_are_nobodys(self, portal, value: str) -> None:
        app, manager = portal
        cookie = f"dispatcher={value}".encode().decode("latin-1")
        response = app.test_client(use_cookies=False).get("/auth/", headers={"Accept": HTML, "Cookie": cookie})
        assert response.status_code == 303
        assert not any(value and value in str(call) for call in manager.calls)

    def test_with_tls_the_name_without_the_prefix_counts_for_nothing(self) -> None:
        app, _ = make(public_url="https://portal.test")
        browser = Browser(app, "https://portal.test")
        browser.sign_in()
        token = browser.cookie("__Host-dispatcher")
        tossed = Browser(app, "https://portal.test")
        tossed.set_cookie("dispatcher", token)
        assert tossed.get("/auth/").status == 303

    def test_another_users_agent_looks_like_a_missing_one(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        fields = browser.get("/auth/").form("/agents")["fields"]
        answers = []
        for name in ("bob", "nobody"):
            pages = [
                browser.post("/auth/agents", fields | {"agent": name, "action": action})
                for action in ("open", "start", "stop", "restart")
            ] + [browser.get("/auth/waiting", X_Dispatcher_Agent=name, X_Dispatcher_Target="/")]
            answers.append([(page.status, re.sub(r'nonce="[^"]*"', "", page.source)) for page in pages])
        assert answers[0] == answers[1]
        assert {status for status, _ in answers[0]} == {404}
        assert manager.agents["bob"]["state"] == "running"

    def test_another_users_session_cannot_be_ended(self, portal) -> None:
        app, manager = portal
        alice, bob = Browser(app), Browser(app)
        alice.sign_in()
        bob.sign_in("bob", "battery staple")
        fields = alice.get("/auth/account").form("/account/sessions")["fields"]
        page = alice.post("/auth/account/sessions", fields | {"id": digest(bob.cookie())[:16]})
        assert page.status == 404
        assert digest(bob.cookie()) in manager.rows

    def test_only_the_edge_states_the_clients_address(self, portal) -> None:
        """The edge replaces X-Forwarded-For; of a list the last entry is the edge's."""
        app, manager = portal
        headers = {"X-Forwarded-For": "203.0.113.9, 192.0.2.1"}
        Program(app).post("/auth/login", {"user": "alice", "password": "x"}, **headers)
        assert manager.calls[-1][2] == "192.0.2.1"


HOSTILE = [
    '"><script>alert(1)</script>',
    "'-alert(1)-'",
    "</title><script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "</pre><iframe srcdoc=x>",
    "\u202eevil",
]


class TestInjection:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_foreign_text_is_escaped(self, text: str) -> None:
        manager = Manager(**{"alice": "correct horse"})
        manager.agents["alice"] |= {
            "state": "failed", "stage": text, "detail": text,
            "failure": {"what": text, "why": text, "fix": text, "log": [text]},
        }  # fmt: skip
        manager.agents[text] = agent("alice", "starting", stage=text, detail=text) | {"name": text, "app": text}
        app, _ = make(manager)
        browser = Browser(app)
        login = browser.client.get(
            "/auth/login", query_string={"next": "/" + text}, headers=browser.headers("GET")
        )
        sources = [login.get_data(as_text=True)]
        page = browser.submit(browser.get("/auth/login"), "/login", {"user": text, "password": "x"})
        assert str(escape(text)) in page.source
        sources.append(page.source)
        browser.sign_in(User_Agent=text.encode().decode("latin-1"))
        sources += [browser.get(path).source for path in ("/auth/", "/auth/account", "/auth/logout")]
        for name in ("alice", text.encode().decode("latin-1")):
            sources.append(browser.get("/auth/waiting", X_Dispatcher_Agent=name, X_Dispatcher_Target="/x").source)
        for message in (NotFound(text, why=text, fix=text), ManagerUnreachable(text, why=text, fix=text)):

            def fail(*_, message=message):
                raise message

            manager.my_agents = fail
            sources.append(browser.get("/auth/", X_Request_ID=text.encode().decode("latin-1")).source)
        for source in sources:
            assert source.count("<script") == 1, source
            assert "<iframe" not in source
            assert "<img" not in source
            assert "49" not in re.sub(r'(nonce|value|href|src)="[^"]*"', "", source)
            for tag in re.findall(r"<[^>]*>", source):
                assert not re.search(r"\son\w+=", re.sub(r'"[^"]*"', "", tag)), tag

    def test_a_notice_in_the_url_is_ignored(self, portal) -> None:
        app, _ = portal
        page = Browser(app).get("/auth/login?notice=Your+account+is+blocked,+call+us")
        assert "blocked" not in page.source

    def test_a_name_of_ten_megabytes(self, portal) -> None:
        app, manager = portal
        assert Browser(app).post("/auth/login", {"user": "x" * 10_000_000}).status == 413
        answer = Program(app).post("/auth/login", {"user": "x" * 50_000, "password": "y"})
        assert answer.status == 403
        assert len(str(manager.calls)) < 10_000
        assert len(answer.source) < 1_000


class TestFrames:
    @pytest.mark.parametrize(
        "path", ["/auth/login", "/auth/", "/auth/account", "/auth/logout", "/auth/waiting", "/auth/x"]
    )
    def test_no_script_and_no_frame_reads_a_page(self, portal, path: str) -> None:
        """An app of the same origin must not get at a form's token."""
        app, manager = portal
        browser = Browser(app)
        browser.sign_in()
        manager.agents["alice"] |= {"state": "failed", "failure": None}
        for mode, destination in (("cors", "empty"), ("same-origin", "empty"), ("navigate", "iframe"),
                                  ("navigate", "object"), ("no-cors", "script")):  # fmt: skip
            page = browser.get(path, Sec_Fetch_Mode=mode, Sec_Fetch_Dest=destination, Sec_Fetch_Site="same-origin")
            assert page.status in {403, 404, 503}
            assert page.response.mimetype == "application/problem+json"
            assert "token" not in page.source

    def test_every_answer_says_how_it_may_be_used(self, portal) -> None:
        app, manager = portal
        browser = Browser(app)
        pages = [browser.get("/auth/login"), browser.get("/auth/nothing"), browser.sign_in()]
        pages += [browser.get(path) for path in ("/auth/", "/auth/account", "/auth/status", "/auth/logout")]
        manager.agents["alice"] |= {"state": "starting"}
        pages += [browser.get("/auth/waiting"), Program(app).get("/auth/status")]
        for page in pages:
            policy = page.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "base-uri 'none'" in policy
            assert "unsafe" not in policy
            assert page.headers["X-Frame-Options"] == "DENY"
            assert page.headers["X-Content-Type-Options"] == "nosniff"
            assert page.headers["Referrer-Policy"] == "same-origin"
            assert page.headers["Cross-Origin-Opener-Policy"] == "noopener-allow-popups"
            assert page.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert page.headers["Cache-Control"] == "no-store"
            assert "Server" not in page.headers

    def test_scripts_and_styles_are_allowed_by_a_nonce_of_this_answer(self, portal) -> None:
        app, _ = portal
        browser = Browser(app)
        seen = set()
        for _ in range(2):
            page = browser.get("/auth/login")
            nonce = re.search(r"script-src 'nonce-([^']+)'", page.headers["Content-Security-Policy"])[1]
            assert page.source.count(f'nonce="{nonce}"') == 2
            assert "'self'" not in re.search(r"script-src[^;]*", page.headers["Content-Security-Policy"])[0]
            seen.add(nonce)
        assert len(seen) == 2
