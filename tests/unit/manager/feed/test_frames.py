"""Snapshots and changes are cut to size and lose nothing."""

from __future__ import annotations

import pytest

from dispatcher.feed import protocol
from dispatcher.feed.protocol import Decoder
from dispatcher.manager.feed import frames as feed_frames
from dispatcher.manager.storage.auth import SessionRow

MANY = protocol.MAX_ROWS


def decoded(frames):
    decoder = Decoder()
    return [message for frame in frames for message in decoder.feed(frame)]


@pytest.mark.parametrize(
    ("agents", "sessions"),
    [
        (0, 0),
        (1, 0),
        (0, 1),
        (MANY, 0),
        (0, MANY),
        (MANY, MANY),
        (MANY - 1, 1),
        (MANY - 1, 2),
        (MANY + 1, MANY * 2 + 1),
    ],
)
def test_a_snapshot_names_everything_once_in_parts_of_so_many(agents, sessions):
    parts = decoded(
        feed_frames.snapshot(
            ({"name": f"a{n}"} for n in range(agents)), ({"sha256": f"s{n}"} for n in range(sessions))
        )
    )
    assert [part["first"] for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part["last"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part["agents"]) + len(part["sessions"]) <= MANY for part in parts)
    assert [row["name"] for part in parts for row in part["agents"]] == [f"a{n}" for n in range(agents)]
    assert [row["sha256"] for part in parts for row in part["sessions"]] == [f"s{n}" for n in range(sessions)]
    assert len(parts) <= (agents + sessions) // MANY + 2


def test_the_parts_are_made_when_they_are_asked_for():
    made = []

    def rows():
        for number in range(MANY * 3):
            made.append(number)
            yield {"sha256": str(number)}

    parts = feed_frames.snapshot([], rows())
    next(parts)
    assert len(made) <= 2 * MANY


def test_changes_hold_only_what_there_is_and_are_cut():
    assert decoded(feed_frames.changes([], [], [], [])) == []
    assert decoded(feed_frames.changes([], [], [], ["x"])) == [{"type": "change", "sessions_gone": ["x"]}]
    gone = [str(number) for number in range(MANY * 2 + 1)]
    messages = decoded(feed_frames.changes([{"name": "a"}], [], ["b"], gone))
    assert len(messages) == 3
    assert [key for message in messages for key in message.get("sessions_gone", [])] == gone
    assert messages[0]["agents"] == [{"name": "a"}]
    assert messages[0]["agents_gone"] == ["b"]


def test_rows_of_sessions():
    row = SessionRow(sha256="s", user="alice", user_id=7, agent="alice", created=1.0, last_used=1.0)
    assert feed_frames.session_row(row, ["alice"], 12.34567) == {
        "sha256": "s",
        "user": "alice",
        "user_id": 7,
        "agent": "alice",
        "agents": ["alice"],
        "ttl": 12.346,
    }
    child = SessionRow(
        sha256="s", user="u", user_id=8, agent="u", created=1.0, last_used=1.0, host="h", parent="p"
    )
    assert feed_frames.session_row(child, ["u"], 1.0)["host"] == "h"


def test_hello_and_error():
    hello, error = decoded([feed_frames.hello("0a1b2c3d", 12.5), feed_frames.error("no")])
    assert hello == {"type": "hello", "version": 1, "installation": "0a1b2c3d", "now": 12.5}
    assert error == {"type": "error", "what": "no"}
