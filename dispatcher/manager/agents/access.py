"""Which apps users may use, by their groups; stops agents that are no longer allowed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from dispatcher.config import groups
from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.lifecycle import CLEARED, Change, Write
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.agents.specs import Memberships
from dispatcher.manager.storage.rows import AgentRow, Desired, Pending
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.names import printable

_log = logging.getLogger("dispatcher.manager")


class Access:
    """What users may use, by their groups and the configuration.

    :ivar on_change: called with a user whose groups have changed.
    """

    def __init__(self, registry: Registry, memberships: Memberships) -> None:
        self._registry = registry
        self._memberships = memberships
        self.on_change: Callable[[str], object] = lambda _user: None

    def load(self) -> None:
        """Read the groups of all users."""
        for user in self._registry.store.users():
            self._memberships.set(user.id, user.groups)

    def set_groups(self, user: str, external: Collection[str]) -> None:
        """Use other groups for a user from now on, as an authenticator named them; agents may have to stop."""
        user_id = self._registry.user_id(user)
        if user_id is not None and self._memberships.set(user_id, external):
            self._registry.specs.forget()
            self.enforce(self._registry.of_user(user))
            self.on_change(user)

    def groups(self, user: str) -> frozenset[str]:
        """Return all groups of a user."""
        return self._registry.specs.groups(user, self._registry.user_id(user))

    def may_use(self, user: str, app: str) -> bool:
        """Whether a user may use an app."""
        return self._registry.specs.may_use(user, self._registry.user_id(user), app)

    def first_app(self, user: str, external: Collection[str] | None) -> str | None:
        """Return the app of a user's first agent, None if the user may use none.

        :param external: groups that an authenticator named; None: those that are known.
        """
        specs = self._registry.specs
        known = self._memberships.get(self._registry.user_id(user)) if external is None else external
        member_of = groups.groups_of(specs.config.groups, user, known)
        allowed = [app for app in specs.config.apps if groups.may_use(specs.config.groups, app, member_of)]
        preferred = specs.config.default_app
        if not preferred and len(allowed) == len(specs.config.apps):
            preferred = "demo"
        if preferred in allowed:
            return preferred
        return allowed[0] if allowed else None

    def enforce(self, agents: Iterable[Agent] | None = None) -> int:
        """Stop those agents whose users may not use the app, by default of all; return how many."""
        stopped = 0
        for agent in list(self._registry.agents.values()) if agents is None else agents:
            row = agent.row
            if row.desired not in {Desired.STOPPED, Desired.ABSENT} and not self.may_use(row.user, row.app):
                stopped += self._stop(agent, f"{row.user} may not use the app {row.app}")
        return stopped

    def stop_all(self, user: str, reason: str) -> None:
        """Stop all agents of a user."""
        for agent in self._registry.of_user(user):
            self._stop(agent, reason)

    def _stop(self, agent: Agent, reason: str) -> bool:
        def decide(row: AgentRow) -> Change | None:
            if row.desired in {Desired.STOPPED, Desired.ABSENT}:
                return None
            agent.reason = reason
            fields = {"desired": Desired.STOPPED, "pending": Pending.NONE, **CLEARED}
            return Change(fields, write=Write.UNLESS_FULL, insist=True, urgent=True)

        try:
            self._registry.change(agent, decide)
        except DispatcherError as error:
            _log.error("%s cannot be stopped: %s", printable(agent.row.name), error)
            return False
        _log.warning("%s is stopped: %s", printable(agent.row.name), agent.reason)
        return True
