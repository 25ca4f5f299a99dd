"""A session of one agent's host, in the hands of that agent: it opens that host and nothing else of its user's.

A page on its own origin can have a hand-over go on (a service worker there sees the code, a script may set the
nonce), so an agent that is hostile to its user can come to hold the token of its own host's session.
"""

from __future__ import annotations

import json

import pytest

from dispatcher.plugin import names
from dispatcher.manager.feed import frames
from dispatcher.manager.auth.sessions import digest
from tests.support.manager_parts import Parts
from tests.support.portal_manager import Browser, Manager, Program, make

APPS = {"demo": {"subprocess": {"command": ["x"]}}, "lab": {"subprocess": {"command": ["x"]}}}
PORTAL = "https://apps.example"
LABEL = names.key("alice")
HOST = f"https://{LABEL}.apps.example"


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path, config={"apps": APPS, "default_app": "demo"})
    parts.add("alice")
    assert parts.add("alice", password=None, app="lab").status_code == 201
    yield parts
    parts.close()


@pytest.fixture
def child(parts):
    """The SHA-256 of a session for the host of `alice`; its user has `alice:lab` as well."""
    parent = parts.login().json["session"]["sha256"]
    host = f"{LABEL}.apps.example"
    code = parts.post("/sessions/handover", sha256=parent, host=host, nonce_sha256=digest("nonce")).json["code"]
    made = parts.post("/sessions/redeem", code=code, nonce="nonce", host=host).json
    parts.supervisor.calls.clear()
    return made["session"]["sha256"]


def test_it_starts_and_stops_its_own_agent_alone(parts, child) -> None:
    for state in ("stopped", "running", "restart"):
        answer = parts.post("/sessions/state", sha256=child, agent="alice:lab", state=state)
        assert answer.status_code in {403, 404}
    assert parts.supervisor.calls == []
    assert parts.post("/sessions/state", sha256=child, agent="alice", state="restart").status_code == 202


def test_it_is_not_turned_to_another_agent(parts, child) -> None:
    assert parts.post("/sessions/select", sha256=child, agent="alice:lab").status_code in {403, 404}
    assert parts.sessions.require(child).agent == "alice"


def test_it_learns_of_no_other_agent_and_no_other_session(parts, child) -> None:
    assert [row["name"] for row in parts.post("/sessions/agents", sha256=child).json["agents"]] == ["alice"]
    assert parts.post("/sessions/lookup", sha256=child).json["agents"] == ["alice"]
    assert parts.post("/sessions/list", sha256=child).status_code == 403
    row = frames.session_row(parts.sessions.require(child), ["alice", "alice:lab"], 1.0)
    assert row["agents"] == ["alice"]


def test_it_ends_nobody_elses_session(parts, child) -> None:
    other = parts.login().json["session"]["sha256"]
    assert parts.post("/sessions/revoke", sha256=child, id=other[:16]).status_code == 403
    assert parts.sessions.get(other) is not None


def test_it_changes_no_password_and_grows_into_no_session_without_a_host(parts, child) -> None:
    body = {"sha256": child, "password": "correct horse", "address": "192.0.2.9"}
    assert parts.post("/sessions/password", **body, new_password="battery staple").status_code == 403
    assert parts.login(password="correct horse").status_code == 201


# The portal.


@pytest.fixture
def portal():
    manager = Manager()
    app, _ = make(manager, routing="subdomain", public_url=PORTAL)
    token, row = manager._begin("alice", host=HOST.partition("://")[2], parent="0" * 64)
    return app, manager, token, row


def test_the_portals_own_host_takes_no_session_of_an_agents_host(portal) -> None:
    app, manager, token, _ = portal
    program = Program(app, PORTAL)
    program.client.set_cookie("__Host-dispatcher", token, domain="apps.example")
    manager.calls.clear()
    assert program.get("/auth/account").status == 401
    assert program.get("/auth/status").status == 401
    assert program.post("/auth/agents", {"agent": "alice", "action": "stop"}).status == 401
    assert {name for name, *_ in manager.calls} == {"lookup"}


def test_an_agents_host_takes_no_other_hosts_session(portal) -> None:
    app, manager, token, row = portal
    bob = f"https://{names.key('bob')}.apps.example"
    stranger, own = Program(app, bob), Program(app, HOST)
    for program in (stranger, own):
        program.client.set_cookie("__Host-dispatcher", token, domain=program.origin.partition("://")[2])
    assert stranger.get("/auth/status").status == 401
    assert own.get("/auth/status").status == 200
    row["host"] = ""  # the portal's own: nobody honest has it there
    assert own.get("/auth/status").status == 401


def test_nobody_signs_in_on_an_agents_host(portal) -> None:
    app, manager, _, _ = portal
    answer = Program(app, HOST).post("/auth/login", {"user": "alice", "password": "correct horse"})
    assert answer.status == 403
    assert "Set-Cookie" not in answer.headers
    browser = Browser(app, HOST)
    assert browser.post("/auth/login", {"user": "alice", "password": "correct horse"}).status == 403
    assert "login" not in {name for name, *_ in manager.calls}
    assert "correct horse" not in json.dumps(manager.calls, default=str)
