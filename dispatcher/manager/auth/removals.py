"""Ends sessions and API tokens when an agent or its user is removed.

A user is removed with the last agent: once that removal is written, all sessions and tokens of the user end, and
the edge has closed their connections before the agent is stopped.  When an agent is gone and its user has others,
the sessions that used it are switched to another one.
"""

from __future__ import annotations

from collections.abc import Callable

from dispatcher.manager.agents.composition import Supervisor
from dispatcher.manager.auth.sessions import Sessions
from dispatcher.manager.auth.tokens import ApiTokens
from dispatcher.manager.storage.rows import Desired


def follow_removals(
    supervisor: Supervisor, sessions: Sessions, tokens: ApiTokens, wait_for_edge: Callable[[], object]
) -> None:
    """Subscribe to removals, and handle those while no manager ran.

    :param wait_for_edge: returns when the edge has applied all changes so far, or after a moment.
    """

    def removed(agent: str, user: str) -> None:
        """An agent is gone, or its removal was written."""
        views = supervisor.queries.views(user=user)
        if all(view.desired is Desired.ABSENT for view in views):
            sessions.revoke_user(user)
            tokens.revoke_user(user)
            wait_for_edge()
        elif all(view.name != agent for view in views):
            others = [view.name for view in views if view.desired is not Desired.ABSENT]
            sessions.replace_agent(user, agent, others[0])

    supervisor.registry.on_removal(removed)
    known = {(row.agent, row.user) for row in sessions.all()}
    known |= {(view.name, view.user) for view in supervisor.queries.views() if view.desired is Desired.ABSENT}
    for agent, user in known:
        views = supervisor.queries.views(user=user)
        if all(view.name != agent or view.desired is Desired.ABSENT for view in views):
            removed(agent, user)
