"""What the portal decides without a request: words, targets, form tokens, static files."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from dispatcher.proxy import cookies, origins
from dispatcher.proxy.edge.http.cookie import split_cookie
from dispatcher.proxy.portal import app, csrf, redirect_targets, words

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("when", "event", "expected"),
    [
        (None, False, ""),
        (NOW.isoformat(), False, "for a moment"),
        ("2026-05-01T09:00:00Z", False, "for 3 hours"),
        ("2026-05-01T09:00:00Z", True, "3 hours ago"),
        ("nonsense", False, "some time ago"),
    ],
)
def test_how_long_a_state_lasts(when: str | None, event: bool, expected: str) -> None:
    assert words.since(when, event=event, now=NOW.timestamp()) == expected


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0", "Firefox on Linux"),
        ("Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537 Chrome/140.0 Safari/537 Edg/140", "Edge on Windows"),
        ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15) AppleWebKit/605 Version/18 Safari/605", "Safari on macOS"),
        ("Mozilla/5.0 (Linux; Android 15) AppleWebKit/537 Chrome/140 Mobile Safari/537", "Chrome on Android"),
        ("curl/8.0", "curl"),
        ("backup-job/3 (nightly)", "backup-job"),
        ("", "Unknown browser"),
        (None, "Unknown browser"),
    ],
)
def test_browsers(agent: str | None, expected: str) -> None:
    assert words.browser(agent) == expected


@pytest.mark.parametrize(
    ("text", "capital", "expected"),
    [("", True, ""), ("wait", True, "Wait."), ("wait!", True, "Wait!"), ("x failed", False, "x failed.")],
)
def test_sentences(text: str, capital: bool, expected: str) -> None:
    assert words.sentence(text, capital=capital) == expected


def test_every_state_of_the_interface_has_a_word() -> None:
    named = "stopped starting running suspending suspended hibernated stopping failed unknown removing"
    assert set(named.split()) == set(words.STATES)
    assert words.state("never-heard-of") == ("Never-heard-of", "calm")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/lab",
        "/lab?reset&x=1#cell",
        "/a%20b%2Fc",
        "/a;b=1//c",
        "/search?q=//evil.example/&u=https://evil.example",
        "/search?q=%0d%0a",
        "/%E2%82%AC",
        "/auth/",
        "/auth/account",
        "/authors",
    ],
)
def test_own_paths_stay_as_they_are(path: str) -> None:
    assert redirect_targets.own_path(path, "/auth") == path


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("/a b", "/a%20b"), ("/é", "/%C3%A9"), ('/"><script>', "/%22%3E%3Cscript%3E")],
)
def test_own_paths_are_encoded(raw: str, expected: str) -> None:
    assert redirect_targets.own_path(raw, "/auth") == expected


@pytest.mark.parametrize("raw", ["/auth/login", "/auth/logout", "/auth/login?next=/x", "/auth/%6cogin"])
def test_signing_in_never_leads_back_to_signing_in(raw: str) -> None:
    assert redirect_targets.own_path(raw, "/auth") == "/"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://Apps.Example.ORG", "https://apps.example.org"),
        ("https://apps.example.org:443/x", "https://apps.example.org"),
        ("http://localhost:8080/", "http://localhost:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("ftp://x", ""),
        ("http://x:99999", ""),
        ("http://[::1", ""),
        ("", ""),
    ],
)
def test_origins(url: str, expected: str) -> None:
    assert origins.origin(url) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("alice-0a1b2c.apps.example:8443", "alice-0a1b2c.apps.example:8443"),
        ("ALICE.apps.example:8443", "alice.apps.example:8443"),
        ("alice.apps.example", ""),
        ("apps.example:8443", ""),
        ("a.b.apps.example:8443", ""),
        (".apps.example:8443", ""),
        ("-a.apps.example:8443", ""),
        ("alice.apps.example:8443.evil", ""),
        ("evil/apps.example:8443", ""),
        ("a@b.apps.example:8443", ""),
        ("", ""),
    ],
)
def test_hosts_of_agents(host: str, expected: str) -> None:
    assert redirect_targets.agent_host(host, "apps.example:8443") == expected


class TestTokens:
    seed = csrf.new_seed()

    def test_it_is_valid_for_its_purpose_session_and_seed_alone(self) -> None:
        token = csrf.token(self.seed, "agents", "session")
        assert csrf.valid(token, [self.seed], "agents", "session")
        assert not csrf.valid(token, [self.seed], "account", "session")
        assert not csrf.valid(token, [self.seed], "agents", "another")
        assert not csrf.valid(token, [csrf.new_seed()], "agents", "session")
        assert not csrf.valid(token, [], "agents", "session")

    def test_it_differs_each_time(self) -> None:
        assert csrf.token(self.seed, "login") != csrf.token(self.seed, "login")

    def test_a_cookie_tossed_beside_the_right_one_does_no_harm(self) -> None:
        token = csrf.token(self.seed, "login")
        assert csrf.valid(token, ["x", csrf.new_seed(), self.seed], "login")

    @pytest.mark.parametrize("given", ["", "x", "0" * 16 + "." + "0" * 64, "0" * 81, "é" * 81])
    def test_made_up_tokens(self, given: str) -> None:
        assert not csrf.valid(given, [self.seed], "login")

    def test_a_weak_seed_counts_for_nothing(self) -> None:
        assert not csrf.valid(csrf.token("a", "login"), ["a"], "login")


def test_static_files_have_names_that_change_with_them(tmp_path) -> None:
    (tmp_path / "a.css").write_text("a {}")
    (tmp_path / "notes.txt").write_text("not served")
    first = app.read_assets(tmp_path)
    (tmp_path / "a.css").write_text("b {}")
    second = app.read_assets(tmp_path)
    assert list(second) == ["a.css"]
    assert first["a.css"].name != second["a.css"].name
    assert second["a.css"].body == b"b {}"


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("dispatcher=abc", ["abc"]),
        ("a=b;dispatcher = abc ;c", ["abc"]),
        ('dispatcher="abc"', ['"abc"']),
        ('dispatcher="a\\142c"', ['"a\\142c"']),
        ("dispatcher=a=b", ["a=b"]),
        ("dispatcher=a; dispatcher=b", ["a", "b"]),
        ("dispatcher; Dispatcher=x; dispatcher-form=x", [""]),
        ("", []),
    ],
)
def test_portal_and_edge_read_the_same_cookies(field: str, expected: list[str]) -> None:
    assert cookies.values(field, "dispatcher") == expected
    only = expected[0].encode() if len(expected) == 1 else None
    assert split_cookie(field.encode(), b"dispatcher")[0] == only
