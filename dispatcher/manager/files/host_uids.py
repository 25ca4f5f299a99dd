"""Host user ids for new agents, from `manager.uid_range`."""

from __future__ import annotations

import os
import pwd

from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.agents import Store
from dispatcher.plugin.errors import Conflict


class HostUids:
    """Allocates ids that no agent, no data and no account of the host has, nor may use.  One thread at a time."""

    def __init__(self, accounts: HostAccounts, store: Store, data: AgentData, installation: str) -> None:
        self._data = data
        self._range = accounts.agent_uids
        self._delegated = accounts.delegated
        self._store = store
        self._installation = installation
        self._last = -1
        self._owners: set[int] = set()  # of data on disk when the first id was allocated

    @property
    def separate(self) -> bool:
        """Whether each agent has an id of its own; else all have the manager's."""
        return self._range is not None

    def may_have(self, uid: int) -> bool:
        """Whether an agent that is not in the database can have an id, which owns its data."""
        first, last = self._range or (0, -1)
        return first <= uid <= last and not self._store.is_taken(uid)

    def allocate(self) -> int:
        """Return an id.

        :raises Conflict: the range is used up.
        """
        if self._range is None:
            return os.geteuid()
        first, last = self._range
        span = last - first + 1
        if self._last < first:  # two installations on one host should not begin at the same one
            begin = first + int(self._installation, 16) % span
            self._last = self._store.last_uid() or begin
            self._owners = self._data.owners()
        for step in range(1, span + 1):
            uid = first + (self._last - first + step) % span
            if self._free(uid):
                self._last = uid
                return uid
        raise Conflict(
            "No host user id is left for a new agent",
            why=f"all of {first} to {last} are taken, or delegated to accounts in /etc/subuid or /etc/subgid",
            fix="widen manager.uid_range",
        )

    def _free(self, uid: int) -> bool:
        return not (
            uid in self._owners
            or any(uid in ids for ids in self._delegated)
            or self._store.is_taken(uid)
            or _is_account(uid)
        )


def _is_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True
