"""Signing in at other sites: what is pending, whose it is, and what an authenticator's faults look like from outside."""

from __future__ import annotations

import threading
import time

import pytest

from dispatcher.manager.auth import web_signin
from dispatcher.manager.auth.sessions import digest
from dispatcher.manager.auth.web_signin import LIFETIME, Pending, PendingSignIns
from dispatcher.plugin import (
    BadRequest,
    Ended,
    Forbidden,
    Redirect,
    Table,
    Unavailable,
    WebAuthenticator,
    WebIdentity,
)
from tests.support.manager_parts import Parts

NONCE = "n" * 43
SITE = "oidc.corp"


class Web(WebAuthenticator):
    """Its answers are what a test sets: a value, or an exception."""

    name = SITE
    api_version = 1
    Options = Table
    several = True
    title = "Corp"

    def __init__(self):
        super().__init__(options=Table())
        self.begun = self.finished = self.over = self.out = None
        self.calls = []

    def _give(self, value):
        if isinstance(value, BaseException):
            raise value
        return value

    def begin(self, *, state, callback, deadline):
        self.calls.append((state, callback))
        return self._give(self.begun or Redirect(url=f"https://login.example.org/?state={state}", kept="kept"))

    def finish(self, parameters, *, kept, callback, deadline):
        self.calls.append((dict(parameters), kept, callback))
        return self._give(self.finished)

    def ended(self, token, *, deadline):
        return self._give(self.over)

    def sign_out_url(self, *, kept, callback, deadline):
        self.calls.append((kept, callback))
        return self._give(self.out)


@pytest.fixture
def web():
    return Web()


@pytest.fixture
def parts(tmp_path, web):
    found = Parts(tmp_path, authenticator=web)
    yield found
    found.close()


def begin(parts, address="192.0.2.1", target="/wanted"):
    answer = parts.post(
        "/signin/begin", authenticator=SITE, nonce_sha256=digest(NONCE), address=address, next=target
    )
    assert answer.status_code == 201, answer.json
    return answer.json["url"].partition("state=")[2]


def finish(parts, state, nonce=NONCE, name=SITE, address="192.0.2.1", **parameters):
    return parts.post(
        "/signin/finish",
        authenticator=name,
        parameters={"state": state, "code": "the code", **parameters},
        nonce=nonce,
        address=address,
    )


def sign_in(parts, web, user="alice", session="s1", subject="1"):
    web.finished = WebIdentity(user=user, subject=subject, session=session, kept="hint")
    answer = finish(parts, begin(parts))
    assert answer.status_code == 201, answer.json
    return answer.json


def test_a_sign_in_is_used_once_by_the_browser_that_began_it(parts, web):
    web.finished = WebIdentity(user="Alice", subject="1", session="s1")
    state = begin(parts)
    assert len(state) == 43
    assert web.calls == [(state, "https://apps.example.org/auth/callback/oidc.corp")]
    for wrong in ({"nonce": "x" * 43}, {"state": "y" * 43}, {"state": ""}):
        refused = finish(parts, **{"state": state} | wrong)
        assert refused.status_code == 403
        assert refused.json["title"] == "This sign-in is not valid any more"
    done = finish(parts, state)
    assert (done.status_code, done.json["session"]["user"], done.json["next"]) == (201, "alice", "/wanted")
    assert web.calls[1] == (
        {"state": state, "code": "the code"}, "kept", "https://apps.example.org/auth/callback/oidc.corp",
    )  # fmt: skip
    assert finish(parts, state).status_code == 403


def test_a_sign_in_is_valid_for_ten_minutes(parts, web):
    web.finished = WebIdentity(user="alice")
    early, late = begin(parts), begin(parts)
    parts.clock.time += LIFETIME - 1
    assert finish(parts, early).status_code == 201
    parts.clock.time += 2
    assert finish(parts, late).status_code == 403


def test_pending_sign_ins_are_bounded_and_one_address_pushes_out_its_own():
    pending = PendingSignIns(limit=10, of_address=4)

    def add(number, address):
        pending.add(f"{address} {number}", Pending(SITE, "c", digest(NONCE), address, "/", 100.0, ""), 0.0)

    for number in range(3):
        add(number, "honest")
    for number in range(50):
        add(number, "flood")
    for number in range(30):
        add(number, f"other{number}")
    assert len(pending) == 10
    for number in range(50):
        add(number, "flood")
    assert len(pending) <= 10
    with pytest.raises(Forbidden):
        pending.take("flood 0", SITE, NONCE, 0.0)
    assert pending.take("flood 49", SITE, NONCE, 0.0).address == "flood"
    add(1, "late")
    pending.add("new", Pending(SITE, "c", digest(NONCE), "late", "/", 300.0, ""), 200.0)
    assert len(pending) == 1


def test_who_is_refused_learns_no_reason_and_the_wanted_page_is_kept(parts, web):
    for refusal in (None, Forbidden("no", why="the user is in none of allow_groups")):
        web.finished = refusal
        answer = finish(parts, begin(parts))
        assert (answer.status_code, answer.json["title"]) == (403, "Corp did not sign you in")
        assert answer.json["next"] == "/wanted"
        assert "allow_groups" not in answer.text
    assert parts.web_signin.sites()[0].problem is None


def test_an_answer_of_a_strangers_own_making_is_no_outage(parts, web):
    web.finished = BadRequest("Corp does not accept the code", why="invalid_grant: the code")
    answer = finish(parts, begin(parts))
    assert (answer.status_code, answer.json["title"]) == (400, "Corp did not confirm the sign-in")
    assert "invalid_grant" not in answer.text and "the code" not in answer.text
    assert parts.web_signin.sites()[0].problem is None


def test_guessing_is_slowed_down_for_its_address_alone(parts, web):
    web.finished = BadRequest("Corp does not accept the code")
    statuses = [finish(parts, begin(parts)).status_code for _ in range(50)]
    assert set(statuses) == {400}
    refused = parts.post("/signin/begin", authenticator=SITE, nonce_sha256=digest(NONCE), address="192.0.2.1")
    assert refused.status_code == 429 and refused.headers["Retry-After"]
    web.finished = WebIdentity(user="alice")
    assert finish(parts, begin(parts, "192.0.2.2"), address="192.0.2.2").status_code == 201


@pytest.mark.parametrize(
    "fault",
    [
        Unavailable("The secret is wrong", why="the code"), RuntimeError("the code"), SystemExit(1), "alice",
        WebIdentity(user=5), WebIdentity(user="alice", session=5), WebIdentity(user="alice", kept="x" * 20_000),
        WebIdentity(user="alice", session="x" * 300), WebIdentity(user="alice", groups="staff"),
        WebIdentity(user="alice", subject=""), Ended(session="s"),
    ],
)  # fmt: skip
def test_a_fault_of_the_plugin_is_an_outage_without_details(parts, web, fault):
    web.finished = fault
    answer = finish(parts, begin(parts))
    assert answer.status_code == 503
    assert answer.json["title"] == "Signing in with Corp is not possible at the moment"
    assert "secret" not in answer.text
    [entry] = parts.web_signin.sites()
    assert entry.problem is not None and "the code" not in str(entry.problem)
    begin(parts)
    assert entry.problem is not None  # that a sign-in can begin proves nothing
    sign_in(parts, web)
    assert entry.problem is None


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("x"), "https://x", Redirect(url="javascript:alert(1)"), Redirect(url="/relative"), Redirect(url=5),
        Redirect(url="https://x/\r\nSet-Cookie: a=b"), Redirect(url="https://x y/"), Redirect(url="https://x", kept=5),
        Redirect(url="https://" + "x" * 20_000), Redirect(url="https://["),
    ],
)  # fmt: skip
def test_a_browser_is_sent_to_web_addresses_only(parts, web, fault):
    web.begun = fault
    answer = parts.post("/signin/begin", authenticator=SITE, nonce_sha256=digest(NONCE), address="192.0.2.1")
    assert answer.status_code == 503


def test_a_call_that_hangs_is_given_up_and_passwords_are_still_checked(parts, web, monkeypatch):
    monkeypatch.setattr(web_signin, "TIMEOUT", 0.3)
    hanging = threading.Event()
    monkeypatch.setattr(web, "finish", lambda *_, **__: hanging.wait(20))
    state, begun = begin(parts), time.monotonic()
    try:
        assert finish(parts, state).status_code == 503
        assert parts.login("alice", "password").status_code == 403
        assert time.monotonic() - begun < 5
    finally:
        hanging.set()


def test_a_name_that_cannot_exist_is_refused_and_no_outage(parts, web):
    for name in ("a b", "", "../x", "x" * 300, "<b>"):
        web.finished = WebIdentity(user=name)
        assert finish(parts, begin(parts)).status_code == 403
    assert parts.web_signin.sites()[0].problem is None


def test_a_title_that_cannot_be_shown_is_replaced(tmp_path):
    for title in ("", 5, "x" * 100, "a\nb", property(lambda self: 1 / 0)):
        web = type("Odd", (Web,), {"title": title})()
        parts = Parts(
            tmp_path / str(id(web)) if (tmp_path / str(id(web))).mkdir() is None else tmp_path, authenticator=web
        )
        assert parts.proxy.get("/signin").json == {"passwords": False, "sites": [{"name": SITE, "title": SITE}]}
        parts.close()


def test_unknown_authenticators_have_no_site(parts):
    for name in ("local", "oidc.other", "x"):
        answer = parts.post("/signin/begin", authenticator=name, nonce_sha256=digest(NONCE), address="192.0.2.1")
        assert answer.status_code == 404
        assert finish(parts, "x" * 43, name=name).status_code == 404
        assert parts.post("/signin/ended", authenticator=name, token="x", address="192.0.2.1").status_code == 404


def test_passwords_are_not_taken_where_only_sites_sign_in(parts):
    assert parts.login("alice", "password").status_code == 403


def test_the_end_of_one_session_there_ends_it_here(parts, web):
    first, second = sign_in(parts, web, session="s1"), sign_in(parts, web, session="s2")
    web.over = Ended(session="s1", subject="1")
    before = len(parts.edge_waits)
    answer = parts.post("/signin/ended", authenticator=SITE, token="t", address="192.0.2.9")
    assert answer.json == {"revoked": 1}
    assert len(parts.edge_waits) == before + 1
    assert parts.sessions.get(first["session"]["sha256"]) is None
    assert parts.sessions.get(second["session"]["sha256"]) is not None


def test_the_end_of_one_session_there_ends_those_of_the_account_that_may_be_it(parts, web):
    """Some providers name the session in logout tokens and not in ID tokens."""
    unknown, known = sign_in(parts, web, session=None), sign_in(parts, web, session="s2")
    other = sign_in(parts, web, user="bob", subject="2", session=None)
    web.over = Ended(session="s1", subject="1")
    assert parts.post("/signin/ended", authenticator=SITE, token="t", address="192.0.2.9").json == {"revoked": 1}
    there = [parts.sessions.get(each["session"]["sha256"]) is not None for each in (unknown, known, other)]
    assert there == [False, True, True]


def test_the_end_of_an_account_there_ends_all_sessions_of_its_user(parts, web):
    mine = [sign_in(parts, web, session=None) for _ in range(2)]
    other = sign_in(parts, web, user="bob", subject="2", session="b")
    web.over = Ended(subject="1")
    assert parts.post("/signin/ended", authenticator=SITE, token="t", address="192.0.2.9").json == {"revoked": 2}
    assert [parts.sessions.get(each["session"]["sha256"]) for each in mine] == [None, None]
    assert parts.sessions.get(other["session"]["sha256"])
    web.over = Ended(subject="unknown")
    assert parts.post("/signin/ended", authenticator=SITE, token="t", address="192.0.2.9").json == {"revoked": 0}


def test_a_message_that_is_not_authentic_ends_nothing(parts, web):
    done = sign_in(parts, web)
    for over, status in (
        (None, 400),
        (Unavailable("down"), 503),
        (Ended(), 503),
        ("s1", 503),
        (RuntimeError("x"), 503),
    ):
        web.over = over
        assert (
            parts.post("/signin/ended", authenticator=SITE, token="t", address="192.0.2.9").status_code == status
        )
    assert parts.sessions.get(done["session"]["sha256"])


def test_signing_out_ends_the_session_and_leads_to_the_site(parts, web):
    web.out = "https://login.example.org/logout"
    done = sign_in(parts, web)
    assert parts.post("/sessions/sign-out", sha256=done["session"]["sha256"]).json == {"url": web.out}
    assert web.calls[-1] == ("hint", "https://apps.example.org/auth/signed-out")
    assert parts.sessions.get(done["session"]["sha256"]) is None
    for out in (None, Unavailable("down"), "javascript:alert(1)", RuntimeError("x")):
        web.out = out
        done = sign_in(parts, web)
        assert parts.post("/sessions/sign-out", sha256=done["session"]["sha256"]).json == {"url": None}
        assert parts.sessions.get(done["session"]["sha256"]) is None
    assert parts.post("/sessions/sign-out", sha256="0" * 64).json == {"url": None}


def test_another_account_does_not_get_a_name_that_has_an_owner(parts, web):
    sign_in(parts, web, subject="1")
    web.finished = WebIdentity(user="alice", subject="2")
    answer = finish(parts, begin(parts))
    assert answer.status_code == 403 and "belongs to another account" in answer.json["title"]


def test_an_account_that_takes_other_names_gets_no_more_agents(parts, web):
    sign_in(parts, web, user="alice", subject="1")
    for name in ("admin", "alice2"):
        web.finished = WebIdentity(user=name, subject="1")
        answer = finish(parts, begin(parts))
        assert (answer.status_code, answer.json["title"]) == (403, "Your account is known here as alice")
        assert parts.supervisor.store.get_user(name) is None
    assert parts.admin.post("/users/alice/release").status_code == 204
    assert sign_in(parts, web, user="alice2", subject="1")["session"]["user"] == "alice2"
    sign_in(parts, web, user="alice", subject="2")
