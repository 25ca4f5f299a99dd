"""Sessions end when their agent or user is removed, and not before that is written."""

from __future__ import annotations

import pytest

from dispatcher.manager.auth.removals import follow_removals
from dispatcher.manager.auth.sessions import digest
from dispatcher.plugin import names
from dispatcher.plugin.errors import Unavailable
from tests.support.manager_parts import Parts


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path, settle=False)
    parts.add("alice")
    parts.add("alice", None, app="lab")
    yield parts
    parts.close()


def signed_in(parts, **more):
    return parts.login(**more).json["session"]["sha256"]


def test_the_sessions_of_a_removed_agent_are_switched_to_another_of_its_user(parts):
    session = signed_in(parts)
    parts.post("/sessions/select", sha256=session, agent="alice:lab")
    parts.supervisor.vanish("alice:lab")
    assert parts.sessions.get(session).agent == "alice"
    parts.supervisor.vanish("alice")
    assert parts.sessions.get(session) is None


def test_the_sessions_of_a_user_end_when_the_removal_of_the_last_agent_is_written(parts):
    session = signed_in(parts)
    parts.admin.delete("/agents/alice%3Alab")
    assert parts.sessions.get(session)
    assert parts.edge_waits == []
    parts.admin.delete("/agents/alice")
    assert parts.sessions.get(session) is None
    assert parts.edge_waits == [1], "the edge has closed the connections before the agent is stopped"
    assert parts.login().status_code == 403


def test_a_removal_that_cannot_be_written_ends_no_session(parts, monkeypatch):
    session = signed_in(parts)
    parts.admin.delete("/agents/alice%3Alab")

    def full(*_args, **_more):
        raise Unavailable("The database cannot be used now", why="disk full")

    monkeypatch.setattr(parts.supervisor, "remove", full)
    assert parts.admin.delete("/agents/alice").status_code == 503
    assert parts.sessions.get(session), "the user stays, and so does the sign-in"


def test_a_removal_that_nothing_is_told_of_leaves_nothing_to_the_next_user_of_the_name(parts):
    parts.supervisor.removal_subscribers.clear()
    old = parts.login().json
    session = old["session"]["sha256"]
    host = f"{names.key('alice')}.apps.example"
    code = parts.post("/sessions/handover", sha256=session, host=host, nonce_sha256=digest("n")).json["code"]
    parts.supervisor.vanish("alice:lab")
    parts.supervisor.vanish("alice")
    assert parts.post("/sessions/lookup", sha256=session).status_code == 404
    assert parts.add("alice", "another password").status_code == 201
    assert parts.post("/sessions/lookup", sha256=session).status_code == 404
    assert parts.post("/sessions/state", sha256=session, agent="alice", state="running").status_code == 404
    assert parts.post("/sessions/redeem", code=code, nonce="n", host=host).status_code == 403
    assert parts.login().status_code == 403
    new = parts.login(password="another password", device=old["device"]).json
    assert new["device"] != old["device"], "the browser that the earlier user had is not known"
    assert [row.sha256 for row in parts.sessions.all("alice")] == [new["session"]["sha256"]]


def test_removals_while_no_manager_ran_are_handled_at_the_start(parts):
    parts.supervisor.removal_subscribers.clear()  # as if no manager ran
    session = signed_in(parts)
    parts.post("/sessions/select", sha256=session, agent="alice:lab")
    other = signed_in(parts)
    parts.supervisor.vanish("alice:lab")
    follow_removals(parts.supervisor, parts.sessions, parts.tokens, lambda: None)
    assert parts.sessions.get(session).agent == "alice"
    assert parts.sessions.get(other).agent == "alice"
    parts.supervisor.removal_subscribers.clear()
    parts.supervisor.commands.remove("alice", keep_data=False)
    follow_removals(parts.supervisor, parts.sessions, parts.tokens, lambda: None)
    assert parts.sessions.get(session) is None
