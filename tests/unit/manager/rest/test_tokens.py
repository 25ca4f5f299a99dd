"""API tokens over REST: what each scope opens, how all others are refused, and who can create one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import structlog

from dispatcher.manager.agents import explain
from dispatcher.common.api_tokens import allows
from dispatcher.manager.rest.access import Tokens, credentials
from dispatcher.manager.rest.application import ROLES
from dispatcher.manager.storage.database import DiskFull
from dispatcher.manager.storage.rows import Failure
from tests.support.manager_parts import Parts, described

PASSWORD = "correct horse"


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path)
    parts.add("alice")
    yield parts
    parts.close()


@pytest.fixture
def remote(parts):
    """A client over TCP."""
    return described("admin", parts.services, credentials(Tokens(None), parts.tokens, lambda: "ok")).test_client()


def bearer(token, scheme="Bearer"):
    return {"Authorization": f"{scheme} {token}"}


def make(parts, *scopes, **more):
    owner = {} if "user" in more else {"service": "script"}
    answer = parts.admin.post("/tokens", json={"scopes": list(scopes), **owner, **more})
    assert answer.status_code == 201, answer.json
    return answer.json


def digest_of(session):
    return session.json["session"]["sha256"]


@pytest.mark.parametrize("scope", ["metrics", "read", "admin", "app"])
def test_each_request_of_the_interface_needs_its_scope(parts, remote, scope):
    """The whole table: a token gets 403 exactly where the scope does not allow it."""
    token = make(parts, scope, user="alice")["token"]
    for route in ROLES["admin"]:
        if route.path == "/healthz":
            continue
        path = route.path.replace("<agent>", "nobody").replace("<id>", "0").replace("<provider>", "none")
        answer = remote.open(path, method=route.method, headers=bearer(token))
        needed = (
            "metrics"
            if path == "/metrics"
            else "read"
            if route.method == "GET" and "logs" not in path
            else "admin"
        )
        allowed = allows((scope,), needed)
        assert (answer.status_code == 403) is not allowed, (route.method, path, answer.json)
        if not allowed:
            assert answer.json["code"] == "insufficient-scope" and answer.json["scope"] == needed
            assert f"needs the scope {needed}, and has {scope}" in answer.json["detail"]
            assert answer.headers["WWW-Authenticate"] == f'Bearer error="insufficient_scope", scope="{needed}"'


def test_metrics_and_nothing_else(parts, remote):
    token = make(parts, "metrics")["token"]
    assert b"dispatcher_agents" in remote.get("/metrics", headers=bearer(token)).data
    assert remote.get("/healthz", headers=bearer(token)).json == {"status": "ok"}
    assert remote.get("/agents", headers=bearer(token)).status_code == 403
    assert remote.get("/openapi.json", headers=bearer(token)).status_code == 403


def test_read_does_not_show_what_apps_print(parts, remote):
    failure = Failure(what="It failed", why="crashed", log=("http://127.0.0.1/?token=secret", "    secret"))
    row = SimpleNamespace(failure=failure, attempts=(), name="alice")
    parts.supervisor.why = lambda _agent: explain._failure(row, 0.0, None, stuck=True)
    with parts.supervisor.changed:
        parts.supervisor.rows["alice"] = replace(parts.supervisor.rows["alice"], failure=failure)
    tokens = {scope: make(parts, scope)["token"] for scope in ("read", "admin")}
    for path in ("/agents", "/agents/alice", "/agents/alice/state", "/agents/alice/why"):
        assert "secret" in remote.get(path, headers=bearer(tokens["admin"])).text
        answer = remote.get(path, headers=bearer(tokens["read"]))
        assert answer.status_code == 200 and "It failed" in answer.text and "secret" not in answer.text
    assert remote.get("/agents/alice/logs", headers=bearer(tokens["read"])).status_code == 403
    assert remote.get("/healthz", headers=bearer(tokens["read"])).json.keys() > {"status"}


def test_unknown_expired_and_revoked_tokens_are_refused_alike(parts, remote):
    expired = make(parts, "admin", expires="1h")["token"]
    parts.clock.time += 3600
    revoked = make(parts, "admin")
    assert parts.admin.delete(f"/tokens/{revoked['id']}").status_code == 204
    unknown = "dsp_" + "x" * 43
    removed = make(parts, "admin", user="alice")["token"]
    parts.supervisor.vanish("alice")
    valid = make(parts, "admin")["token"]
    answers = [
        remote.get("/agents", headers=bearer(token))
        for token in (expired, revoked["token"], unknown, removed, "", valid + "x", valid[:-1], "x" * 20_000)
    ]
    answers.append(remote.get(f"/agents?token={valid}&access_token={valid}"))
    answers.append(remote.get("/agents", headers=bearer(valid, "Token")))
    answers.append(remote.get("/agents", headers=bearer(valid + "," + valid)))
    answers.append(remote.get("/agents", headers={"Cookie": f"dispatcher={valid}"}))
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.data for answer in answers}) == 1
    assert {answer.headers["WWW-Authenticate"] for answer in answers} == {"Bearer"}
    for scheme in ("Bearer", "bearer", "BEARER", "Bearer  "):
        assert remote.get("/agents", headers=bearer(valid, scheme)).status_code == 200


def test_guesses_do_not_fill_the_log(remote):
    with structlog.testing.capture_logs() as lines:
        for number in range(50):
            assert remote.get("/agents", headers=bearer(f"dsp_{number:043}")).status_code == 401
    assert [line["event"] for line in lines] == ["refused without a credential"]


def test_what_a_token_changes_is_logged_with_its_id(parts, remote):
    made = make(parts, "admin")
    with structlog.testing.capture_logs() as lines:
        assert remote.post("/reload", headers=bearer(made["token"])).status_code == 200
        assert remote.get("/agents", headers=bearer(made["token"])).status_code == 200
    audit = [line for line in lines if line["event"] == "request with an API token"]
    assert [(line["id"], line["owner"], line["method"], line["path"]) for line in audit] == [
        (made["id"], "service script", "POST", "/reload")
    ]
    assert made["token"] not in repr(lines)


def test_use_is_shown(parts, remote):
    made = make(parts, "metrics")
    assert made["last_used"] is None
    parts.clock.time += 7
    remote.get("/metrics", headers=bearer(made["token"]))
    shown = parts.admin.get("/tokens").json["tokens"]
    assert [(token["id"], token["last_used"]) for token in shown] == [
        (made["id"], "2027-01-15T08:00:07.000+00:00")
    ]


def test_listing_never_shows_a_token(parts):
    made = [make(parts, "read", note="one"), make(parts, "app", user="Alice", expires="never")]
    answer = parts.admin.get("/tokens")
    assert [token["id"] for token in answer.json["tokens"]] == [made[1]["id"], made[0]["id"]] or (
        {token["id"] for token in answer.json["tokens"]} == {token["id"] for token in made}
    )
    assert not any(token["token"] in answer.text for token in made)
    mine = parts.admin.get("/tokens?user=alice").json["tokens"]
    assert [(token["user"], token["service"], token["expires"]) for token in mine] == [("alice", None, None)]


def test_revoking_a_users_tokens(parts):
    make(parts, "app", user="alice")
    waits = len(parts.edge_waits)
    assert parts.admin.delete("/tokens?user=alice").json == {"revoked": 1}
    assert len(parts.edge_waits) == waits + 1
    assert parts.admin.delete("/tokens?user=alice").json == {"revoked": 0}
    assert parts.admin.delete("/tokens?user=nobody").status_code == 404
    assert parts.admin.delete("/tokens").status_code == 400
    assert parts.admin.delete("/tokens/0123456789abcdef").status_code == 404


def test_a_token_without_a_scope_is_an_error_that_lists_them(parts):
    answer = parts.admin.post("/tokens", json={"service": "x"})
    assert answer.status_code == 400
    assert all(f"{scope}: " in answer.json["fix"] for scope in ("metrics", "read", "admin", "app"))


def test_a_person_makes_tokens_for_the_own_agents_only(parts):
    sha256 = digest_of(parts.login())
    made = parts.post("/sessions/tokens", sha256=sha256, address="192.0.2.1", password=PASSWORD, note="export")
    assert made.status_code == 201
    assert (made.json["scopes"], made.json["user"], made.json["note"]) == (["app"], "alice", "export")
    found = parts.post("/sessions/list", sha256=sha256).json
    assert [token["id"] for token in found["tokens"]] == [made.json["id"]]
    assert found["tokens_need_password"] is True
    more = {"sha256": sha256, "address": "", "password": PASSWORD}
    assert parts.post("/sessions/tokens", **more, scopes=["admin"]).status_code == 400
    assert parts.post("/sessions/tokens", **more, user="bob").status_code == 400


def test_no_token_outlasts_a_user_who_is_signed_out_while_it_is_made(parts):
    sha256 = digest_of(parts.login())
    check = parts.services.signin.check

    def slow(user, *arguments):
        check(user, *arguments)
        parts.services.sessions.revoke_user(user)
        parts.services.tokens.revoke_user(user)

    parts.services.signin.check = slow
    made = parts.post("/sessions/tokens", sha256=sha256, address="192.0.2.1", password=PASSWORD)
    assert made.status_code == 404
    assert parts.services.tokens.all("alice") == []


def test_a_session_alone_makes_no_token_where_passwords_are_here(parts):
    sha256 = digest_of(parts.login())
    assert parts.post("/sessions/tokens", sha256=sha256, address="").status_code == 400
    wrong = parts.post("/sessions/tokens", sha256=sha256, address="", password="wrong password")
    assert wrong.status_code == 403
    for _ in range(5):
        last = parts.post("/sessions/tokens", sha256=sha256, address="", password="wrong password")
    assert last.status_code == 429  # guesses of the password are throttled as at the sign-in
    assert parts.tokens.count() == 0


def test_an_app_cannot_make_list_or_revoke_tokens(parts):
    """Its host's session is a child, whose token the app can obtain."""
    parent = digest_of(parts.login())
    parts.post("/sessions/tokens", sha256=parent, address="", password=PASSWORD)
    row = parts.sessions.require(parent)
    _, child = parts.sessions.child(row, "alice.example.org", "alice")
    token = parts.tokens.all("alice")[0]
    for path, more in (
        ("/sessions/tokens", {"address": "", "password": PASSWORD}),
        ("/sessions/list", {}),
        ("/sessions/tokens/revoke", {"id": token.sha256[:16]}),
    ):
        assert parts.post(path, sha256=child.sha256, **more).status_code == 403
    assert parts.tokens.all("alice") == [token]


def test_a_token_opens_no_request_of_a_session(parts):
    made = make(parts, "app", user="alice")
    sha256 = parts.tokens.all()[0].sha256
    for path in ("/sessions/lookup", "/sessions/list", "/sessions/agents", "/sessions/revoke"):
        assert parts.post(path, sha256=sha256).status_code in {404, 204}
    assert parts.tokens.find(made["token"])


def test_one_person_cannot_revoke_anothers_token(parts):
    parts.add("bob")
    make(parts, "app", user="bob")
    bobs = parts.tokens.all("bob")[0]
    sha256 = digest_of(parts.login())
    assert parts.post("/sessions/tokens/revoke", sha256=sha256, id=bobs.sha256[:16]).status_code == 404
    assert parts.tokens.all("bob") == [bobs]
    assert parts.post("/sessions/tokens", sha256=sha256, address="", password=PASSWORD).status_code == 201
    mine = parts.tokens.all("alice")[0]
    assert parts.post("/sessions/tokens/revoke", sha256=sha256, id=mine.sha256[:16]).status_code == 204
    assert parts.tokens.all("alice") == []


@pytest.mark.parametrize("revoke", [True, False])
def test_a_changed_password_revokes_tokens_if_asked(parts, revoke):
    make(parts, "app", user="alice")
    sha256 = digest_of(parts.login())
    body = {"sha256": sha256, "password": PASSWORD, "new_password": "battery staple", "address": ""}
    assert parts.post("/sessions/password", **body, revoke_tokens=revoke).status_code == 200
    assert parts.tokens.count() == (0 if revoke else 1)


def test_an_administrators_password_change_keeps_tokens(parts):
    make(parts, "app", user="alice")
    assert parts.admin.put("/agents/alice/password", json={"password": "battery staple"}).status_code == 204
    assert parts.tokens.count() == 1


def test_a_revocation_that_cannot_be_stored_takes_effect_and_is_told(parts, remote, monkeypatch):
    made = make(parts, "admin")

    def full(_sha256s):
        raise DiskFull("The database cannot be used now", why="the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("dispatcher.manager.storage.tokens.TokenStore.remove", lambda self, sha256s: full(sha256s))
        answer = parts.admin.delete(f"/tokens/{made['id']}")
        assert answer.status_code == 503 and "takes effect, but is not stored" in answer.json["title"]
        assert remote.get("/agents", headers=bearer(made["token"])).status_code == 401
    parts.tokens.maintain()
    again = make(parts, "admin")
    assert parts.admin.delete(f"/tokens/{again['id']}").status_code == 204
