"""Ends sessions when an agent or its user is removed.

A user is removed with the last agent: once that removal is written, all sessions of the user end, and the edge has
closed their connections before the agent is stopped.  When an agent is gone and its user has others, the sessions
that used it are switched to another one.
"""

from __future__ import annotations

from collections.abc import Callable

from dispatcher.manager.agents.supervisor import Supervisor
from dispatcher.manager.auth.sessions import Sessions
from dispatcher.manager.storage.states import Desired


class Removals:
    """A subscriber to `Registry.on_removal`.

    :param wait_for_edge: returns when the edge has applied all changes so far, or after a moment.
    """

    def __init__(
        self, supervisor: Supervisor, sessions: Sessions, wait_for_edge: Callable[[], object] = lambda: None
    ) -> None:
        self._supervisor = supervisor
        self._sessions = sessions
        self._wait_for_edge = wait_for_edge

    def start(self) -> None:
        """Subscribe, and handle the removals while no manager ran."""
        self._supervisor.registry.on_removal(self.removed)
        for agent, user in {(row.agent, row.user) for row in self._sessions.all()}:
            views = self._supervisor.queries.views(user=user)
            if all(view.name != agent or view.desired is Desired.ABSENT for view in views):
                self.removed(agent, user)

    def removed(self, agent: str, user: str) -> None:
        """An agent is gone, or its removal was written."""
        views = self._supervisor.queries.views(user=user)
        if all(view.desired is Desired.ABSENT for view in views):
            self._sessions.user_removed(user)
            self._wait_for_edge()
        elif all(view.name != agent for view in views):
            others = [view.name for view in views if view.desired is not Desired.ABSENT]
            self._sessions.replace_agent(user, agent, others[0])
