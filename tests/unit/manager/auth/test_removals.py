"""Sessions end when their agent or user is removed, and not before that is written."""

from __future__ import annotations

import pytest

from dispatcher.manager.auth.removals import follow_removals
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


def test_removals_while_no_manager_ran_are_handled_at_the_start(parts):
    parts.supervisor.removal_subscribers.clear()  # as if no manager ran
    session = signed_in(parts)
    parts.post("/sessions/select", sha256=session, agent="alice:lab")
    other = signed_in(parts)
    parts.supervisor.vanish("alice:lab")
    follow_removals(parts.supervisor, parts.sessions, lambda: None)
    assert parts.sessions.get(session).agent == "alice"
    assert parts.sessions.get(other).agent == "alice"
    parts.supervisor.removal_subscribers.clear()
    parts.supervisor.commands.remove("alice", keep_data=False)
    follow_removals(parts.supervisor, parts.sessions, lambda: None)
    assert parts.sessions.get(session) is None
