"""What the handlers work with, and the forms of their answers.  No HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dispatcher.config.load import Config
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.agents.metrics import Metrics
from dispatcher.manager.agents.supervisor import Supervisor
from dispatcher.manager.agents.views import AgentView, iso
from dispatcher.manager.auth.handover import HandoverCodes
from dispatcher.manager.auth.sessions import ID_LENGTH, Sessions
from dispatcher.manager.auth.signin import SignIn
from dispatcher.manager.storage.auth import SessionRow, Visitor
from dispatcher.plugin.deadline import Deadline, SteadyWallClock
from dispatcher.plugin.errors import Conflict, DispatcherError, NotFound, StartFailed

Json = dict[str, Any]
_SLICE = 1.0  # seconds between two looks at whether the manager is closing
_STATE = ("state", "desired", "stage", "detail", "fraction", "since", "failure", "outdated")


@dataclass(kw_only=True)
class Services:
    """The manager's parts.

    :ivar config: the current one; replaced by a reload.
    :ivar reload: reads the configuration again and says in sentences what changed.
    :ivar health: says how the manager is; must not block.
    :ivar settle: waits a moment until the edge knows what has changed: an ended session is dead everywhere then.
    :ivar waiting: places for requests that wait; :ivar closing: set when the manager ends.
    """

    config: Config
    supervisor: Supervisor
    sessions: Sessions
    signin: SignIn
    clock: SteadyWallClock
    metrics: Metrics
    reload: Callable[[], list[str]]
    health: Callable[[], Json]
    settle: Callable[[], object] = lambda: None
    waiting: threading.BoundedSemaphore
    handovers: HandoverCodes = field(default_factory=HandoverCodes)
    closing: threading.Event = field(default_factory=threading.Event)

    def wait(self, agent: str, done: Callable[[AgentView | None], bool], seconds: float) -> AgentView | None:
        """Return the agent's view once it is done, or after `seconds`, or at once when too many wait already.

        None: it is gone.
        """
        deadline = Deadline(seconds)
        if not seconds or not self.waiting.acquire(blocking=False):
            return self._view(agent)
        try:
            while True:
                try:
                    view = self.supervisor.wait(agent, done, min(_SLICE, deadline.remaining()))
                except NotFound:
                    view = None
                if done(view) or deadline.expired or self.closing.is_set():
                    return view
        finally:
            self.waiting.release()

    def _view(self, agent: str) -> AgentView | None:
        try:
            return self.supervisor.view(agent)
        except NotFound:
            return None

    def user_of(self, agent: str) -> str:
        """Return the user of an agent.

        :raises NotFound: there is no such agent.
        """
        return self.supervisor.view(agent).user

    def agents_of(self, row: SessionRow) -> list[AgentView]:
        """Return the agents that a session is for: its user's, or the one of its host."""
        views = self.supervisor.views(user=row.user)
        return [view for view in views if not row.parent or view.name == row.agent]

    def own(self, row: SessionRow, agent: str) -> AgentView:
        """Return an agent that a session is for; any other is as unknown as none.

        :raises NotFound: as said.
        """
        view = self._view(agent)
        if view is None or view.user != row.user or (row.parent and agent != row.agent):
            raise NotFound(f"There is no agent {agent}", fix="see the dashboard for your agents")
        return view

    def session_json(self, row: SessionRow) -> Json:
        """Return SESSION of the role *proxy*."""
        found: Json = {
            "sha256": row.sha256,
            "user": row.user,
            "agent": row.agent,
            "agents": [view.name for view in self.agents_of(row)],
            "ttl": round(self.sessions.ttl(row), 3),
            "lifetime": round(self.sessions.lifetime(row), 3),
            "created": iso(row.created),
        }
        if row.parent:
            found |= {"parent": row.parent, "host": row.host}
        return found

    def listed(self, rows: list[SessionRow]) -> list[Json]:
        """Return sessions as they are listed, the last used first.  Children count as their parent."""
        rows = sorted((row for row in rows if not row.parent), key=lambda row: -row.last_used)
        visitors = self.sessions.visitors(rows)
        return [
            {
                "id": row.sha256[:ID_LENGTH],
                "user": row.user,
                "agent": row.agent,
                "created": iso(row.created),
                "last_used": iso(row.last_used),
                "expires": iso(self.sessions.expires(row)),
                "address": visitors.get(row.sha256, Visitor()).address,
                "user_agent": visitors.get(row.sha256, Visitor()).user_agent,
            }
            for row in rows
        ]


def state_json(view: AgentView) -> Json:
    """Return STATE."""
    whole = view.to_json()
    return {name: whole[name] for name in _STATE}


def settled(wanted: str, restless: frozenset[State] = frozenset()) -> Callable[[AgentView | None], bool]:
    """Return whether an agent has come where `wanted` leads, failed on the way, or is wanted elsewhere by now."""

    def done(view: AgentView | None) -> bool:
        if view is None or view.desired.value != wanted:
            return True
        return view.state in (TARGETS[wanted] | {State.FAILED}) - restless

    return done


#: Where an agent may end up when a state is wanted: one that has ended has nothing to put to sleep.
TARGETS = {
    "running": frozenset({State.RUNNING}),
    "suspended": frozenset({State.SUSPENDED, State.HIBERNATED, State.STOPPED}),
    "hibernated": frozenset({State.HIBERNATED, State.STOPPED}),
    "stopped": frozenset({State.STOPPED}),
    "absent": frozenset(),
}


def outcome(agent: str, view: AgentView | None, wanted: str) -> bool:
    """Return whether an agent has come where `wanted` leads.

    :raises NotFound: it is gone; :raises Conflict: somebody wants something else by now.
    :raises ProviderError: it failed on the way, with the reason and its last lines.
    """
    if view is None:
        raise NotFound(f"There is no agent {agent} any more", why="it was removed meanwhile")
    if view.desired.value != wanted:
        raise Conflict(f"{agent} shall be {view.desired.value} by now", why="somebody asked for that meanwhile")
    if view.state is State.FAILED and wanted != "absent":
        raise failure(view)
    return view.state in TARGETS[wanted]


def failure(view: AgentView) -> DispatcherError:
    """Return an agent's failure as an error."""
    found = view.failure
    if found is None:
        return StartFailed(f"{view.name} failed", fix=f"see: dispatcher why {view.name}")
    return StartFailed(found.what, why=found.why, fix=found.fix, details={"log": list(found.log)})
