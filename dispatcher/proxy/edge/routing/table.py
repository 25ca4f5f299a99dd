"""The edge's tables of agents and sessions: messages of the manager's feed in, changes out.

Rows are updated in place, so that a reference to an agent or a session stays good while it exists; a removed
one has `gone` set.  Times are seconds of one steady clock that the caller passes in.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from dispatcher.feed import protocol
from dispatcher.proxy.edge.routing.activity import Traffic

_NO_AGENTS: tuple[str, ...] = ()


class Agent:
    """One agent's row, and this worker's counters for it.

    :ivar generation: increases when connections to the agent's endpoint must no longer be used.
    :ivar idle: pooled upstream connections, the most recently used last; :ivar in_flight: requests in progress.
    :ivar next_chunks: when the next body of tiny chunks is read, see `dense_pause`.
    :ivar waiting: requests held until the agent runs; :ivar watchers: event streams of its state.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.user = ""
        self.user_id = 0
        self.app = ""
        self.label = ""
        self.state = ""
        self.endpoint = ""
        self.uid: int | None = None
        self.stage = ""
        self.detail = ""
        self.fraction: float | None = None
        self.failed: object = None
        self.generation = 0
        self.gone = False
        self.identity = b""
        self.statement = ""
        self.idle: list[Any] = []
        self.in_flight = 0
        self.waiting: dict[Any, None] = {}
        self.watchers: dict[Any, None] = {}
        self.tunnels: dict[Any, None] = {}
        self.woken = 0.0
        self.next_chunks = 0.0
        self.traffic = Traffic()
        self.memory: Any = None  # the router's
        self.counters: list[int] | None = None  # the row of `Counters`

    def update(self, row: dict[str, Any]) -> bool:
        """Update from a row; return whether connections to the old endpoint must be dropped."""
        state = row.get("state", "")
        endpoint = row.get("endpoint") or ""
        uid = row.get("uid")
        moved = endpoint != self.endpoint or uid != self.uid or (self.state == "running" and state != "running")
        statement = row.get("identity") or ""
        if row.get("user", "") != self.user or statement != self.statement or not self.identity:
            self.user, self.statement = sys.intern(row.get("user", "")), statement
            # Names may hold any letter; a header field holds ASCII (RFC 9110, 5.5): percent-encoded UTF-8.
            self.identity = b"X-Dispatcher-User: %b\r\n" % quote(self.user, safe="@+._-").encode("ascii")
            if statement:
                self.identity += b"X-Dispatcher-Identity: %b\r\n" % statement.encode("ascii")
        self.user_id = row.get("user_id", 0)
        if row.get("app", "") != self.app:
            self.app = sys.intern(row.get("app", ""))
            self.counters = None
        self.label = row.get("label", "")
        if state == "running" and self.state != "running":
            self.woken = 0.0  # if it falls asleep again, the next request wakes it at once
        self.state = sys.intern(state)
        self.endpoint = endpoint
        self.uid = uid
        self.stage = row.get("stage") or ""
        self.detail = row.get("detail") or ""
        self.fraction = row.get("fraction")
        self.failed = row.get("failed")
        if moved:
            self.generation += 1
        return moved

    def public(self) -> dict[str, Any]:
        """Return the part that the owner's browser may see."""
        return {
            "agent": self.name,
            "state": self.state if not self.gone else "gone",
            "stage": self.stage,
            "detail": self.detail,
            "fraction": self.fraction,
            "failed": bool(self.failed),  # the sentence is for operators
        }


class Session:
    """One session's row, or that of an API token.

    :ivar user_id: only agents with the same one are the session's: a name may be another person's by now.
    :ivar bearer: it is an API token; the row is in `Tables.tokens`, and no cookie finds it.
    :ivar digest: SHA-256 of the token, 32 bytes; :ivar expires: on the caller's clock, infinite without end.
    :ivar target: the agent of its requests, once it was looked up.
    :ivar connections: client connections that were last used with it, None while there is none.
    """

    def __init__(self, digest: bytes, bearer: bool = False) -> None:
        self.digest = digest
        self.bearer = bearer
        self.user = ""
        self.user_id = 0
        self.agent = ""
        self.agents = _NO_AGENTS
        self.expires = 0.0
        self.host = ""
        self.gone = False
        self.used = False
        self.target: Agent | None = None
        self.connections: dict[Any, None] | None = None


class Changes:
    """The changes of one message."""

    def __init__(self) -> None:
        self.agents: list[Agent] = []
        self.moved: list[Agent] = []
        self.sessions_gone: list[Session] = []


class Tables:
    """Agents by name and label, sessions and API tokens by digest."""

    def __init__(self) -> None:
        self.agents: dict[str, Agent] = {}
        self.labels: dict[str, Agent] = {}
        self.sessions: dict[bytes, Session] = {}
        self.tokens: dict[bytes, Session] = {}
        self._snapshot_agents: set[str] | None = None
        self._snapshot_sessions: set[bytes] = set()
        self._snapshot_tokens: set[bytes] = set()
        self._tuples: dict[tuple[str, ...], tuple[str, ...]] = {}

    def apply(self, message: dict[str, Any], now: float) -> Changes:
        """Apply a part of a snapshot, a change or the answer to a lookup.

        :raises KeyError, TypeError, ValueError: an invalid row; the feed is then unusable.
        """
        changes = Changes()
        kind = message["type"]
        if kind == protocol.SNAPSHOT:
            if message.get("first"):
                self._snapshot_agents, self._snapshot_sessions, self._snapshot_tokens = set(), set(), set()
                self._tuples.clear()
            self._rows(message, now, changes)
            if self._snapshot_agents is not None:
                self._snapshot_agents.update(row["name"] for row in message.get("agents", ()))
                self._snapshot_sessions.update(_digests(message, "sessions"))
                self._snapshot_tokens.update(_digests(message, "tokens"))
                if message.get("last"):
                    known, tokens = self._snapshot_sessions, self._snapshot_tokens
                    self._drop_sessions(self.sessions, [d for d in self.sessions if d not in known], changes)
                    self._drop_sessions(self.tokens, [d for d in self.tokens if d not in tokens], changes)
                    self._drop_agents([n for n in self.agents if n not in self._snapshot_agents], changes)
                    self._snapshot_agents = None
                    self._snapshot_sessions, self._snapshot_tokens = set(), set()
        elif kind == protocol.CHANGE:
            self._rows(message, now, changes)
            self._drop_sessions(self.sessions, map(bytes.fromhex, message.get("sessions_gone", ())), changes)
            self._drop_sessions(self.tokens, map(bytes.fromhex, message.get("tokens_gone", ())), changes)
            self._drop_agents(message.get("agents_gone", ()), changes)
        elif kind == protocol.SESSION:
            rows = {"agents": message.get("agents", ()), "sessions": ()}
            if message.get("session"):
                rows["sessions"] = (message["session"],)
            self._rows(rows, now, changes)
        return changes

    def target(self, session: Session) -> Agent | None:
        """Return the agent that a session's requests go to."""
        agent = session.target
        if agent is None or agent.gone:
            agent = session.target = self.agents.get(session.agent)
        return agent

    def clear(self, changes: Changes) -> None:
        """Remove all rows."""
        self._drop_sessions(self.sessions, list(self.sessions), changes)
        self._drop_sessions(self.tokens, list(self.tokens), changes)
        self._drop_agents(list(self.agents), changes)

    def _rows(self, message: dict[str, Any], now: float, changes: Changes) -> None:
        for row in message.get("agents", ()):
            name = row["name"]
            agent = self.agents.get(name)
            if agent is None:
                agent = self.agents[name] = Agent(name)
            if agent.label != row.get("label", ""):
                self.labels.pop(agent.label, None)
            if agent.update(row):
                changes.moved.append(agent)
            if agent.label:
                self.labels[agent.label] = agent
            changes.agents.append(agent)
        for row in message.get("sessions", ()):
            digest = bytes.fromhex(row["sha256"])
            session = self.sessions.get(digest)
            if session is None:
                session = self.sessions[digest] = Session(digest)
            self._update(session, row, now)
        for row in message.get("tokens", ()):
            digest = bytes.fromhex(row["sha256"])
            session = self.tokens.get(digest)
            if session is None:
                session = self.tokens[digest] = Session(digest, bearer=True)
            self._update(session, row, now)

    def _update(self, session: Session, row: dict[str, Any], now: float) -> None:
        agent = self.agents.get(row.get("agent") or "")
        session.target = agent
        session.agent = agent.name if agent else row.get("agent") or ""
        session.user = agent.user if agent and agent.user == row["user"] else row["user"]
        session.user_id = row["user_id"]
        names = tuple(row.get("agents", ()))
        session.agents = self._tuples.setdefault(names, names)
        ttl = row.get("ttl")
        session.expires = float("inf") if ttl is None else now + ttl
        session.host = row.get("host") or ""

    def _drop_sessions(self, of: dict[bytes, Session], digests: Iterable[bytes], changes: Changes) -> None:
        for digest in digests:
            session = of.pop(digest, None)
            if session is not None:
                session.gone = True
                changes.sessions_gone.append(session)

    def _drop_agents(self, names: Iterable[str], changes: Changes) -> None:
        for name in list(names):
            agent = self.agents.pop(name, None)
            if agent is None:
                continue
            agent.gone = True
            agent.state = "gone"
            agent.generation += 1
            if self.labels.get(agent.label) is agent:
                del self.labels[agent.label]
            changes.moved.append(agent)
            changes.agents.append(agent)


def _digests(message: dict[str, Any], kind: str) -> list[bytes]:
    return [bytes.fromhex(row["sha256"]) for row in message.get(kind, ())]
