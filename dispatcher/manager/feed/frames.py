"""The frames that the manager sends, within the size limit (docs/reference/feed.md).  Pure: rows in, bytes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from dispatcher.feed import protocol
from dispatcher.manager.storage.auth import SessionRow
from dispatcher.manager.storage.tokens import TokenRow

Row = dict[str, Any]


def hello(installation: str, now: float) -> bytes:
    """Return the first frame.

    :param now: seconds on the boot clock.
    """
    return protocol.encode(
        {"type": protocol.HELLO, "version": protocol.VERSION, "installation": installation, "now": round(now, 3)}
    )


def error(what: str) -> bytes:
    """Return the last frame of a refused connection."""
    return protocol.encode({"type": protocol.ERROR, "what": what})


def session_row(row: SessionRow, agents: Sequence[str], ttl: float) -> Row:
    """Return SESSION.

    :param agents: names of all agents of its user; a session for one host gets only its own.
    :param ttl: seconds until it ends if it is not used.
    """
    found: Row = {
        "sha256": row.sha256,
        "user": row.user,
        "user_id": row.user_id,
        "agent": row.agent,
        "agents": [row.agent] if row.host else agents,
        "ttl": round(ttl, 3),
    }
    if row.host:
        found["host"] = row.host
    return found


def token_row(row: TokenRow, agents: Sequence[str], default: str, ttl: float | None) -> Row:
    """Return TOKEN: of a token that opens the agents of its user.

    :param agents: names of all agents of its user; :param default: the one without a choice, "" if there is none.
    :param ttl: seconds until it expires, None: never.
    """
    return {
        "sha256": row.sha256,
        "user": row.user,
        "user_id": row.user_id,
        "agent": default,
        "agents": agents,
        "ttl": None if ttl is None else round(ttl, 3),
    }


def snapshot(agents: Iterable[Row], sessions: Iterable[Row], tokens: Iterable[Row] = ()) -> Iterator[bytes]:
    """Yield the parts of a snapshot lazily, at least one."""
    every = {"agents": agents, "sessions": sessions, "tokens": tokens}
    rows = ((kind, row) for kind, some in every.items() for row in some)
    part = list(islice(rows, protocol.MAX_ROWS))
    first = True
    while first or part:
        following = list(islice(rows, protocol.MAX_ROWS))
        message: Row = {"type": protocol.SNAPSHOT, "first": first, "last": not following}
        for kind in every:
            message[kind] = [row for of, row in part if of == kind]
        yield protocol.encode(message)
        part, first = following, False


def changes(
    agents: Sequence[Row],
    sessions: Sequence[Row],
    agents_gone: Sequence[str],
    sessions_gone: Sequence[str],
    tokens: Sequence[Row] = (),
    tokens_gone: Sequence[str] = (),
) -> Iterator[bytes]:
    """Yield changes; ended sessions and tokens come first."""
    size = protocol.MAX_ROWS
    everything: dict[str, Sequence[Any]] = {
        "sessions_gone": sessions_gone,
        "tokens_gone": tokens_gone,
        "agents": agents,
        "sessions": sessions,
        "tokens": tokens,
        "agents_gone": agents_gone,
    }
    longest = max(len(rows) for rows in everything.values())
    for index in range(0, longest, size):
        message: Row = {"type": protocol.CHANGE}
        message.update(
            (name, rows[index : index + size]) for name, rows in everything.items() if index < len(rows)
        )
        yield protocol.encode(message)


def looked_up(sha256: str, session: Row | None, agents: Sequence[Row]) -> bytes:
    """Return the answer to a lookup."""
    return protocol.encode(
        {"type": protocol.SESSION, "sha256": sha256, "session": session, "agents": list(agents)}
    )


PING = protocol.encode({"type": protocol.PING})
