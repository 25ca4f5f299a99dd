"""What could not, or need not, be written at once.  Touches the store.

Memory is ahead of the database for a moment: after a sweep over many agents, and while the disk is full or the
database is locked.  Everything put off is written in one transaction, as soon as that works.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.storage.agents import Store
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import AgentEvent

MOST_EVENTS = 100_000  # more are forgotten, the oldest first: a disk may stay full for days

_log = logging.getLogger("dispatcher.manager")


class Backlog:
    """Rows that are dirty, and events that wait."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._events: list[tuple[int, AgentEvent]] = []
        self._lock = threading.Lock()

    def add(self, agent: Agent, events: Iterable[tuple[int, AgentEvent]]) -> None:
        """Write an agent's row and events later.  Its lock is held."""
        agent.dirty = True
        with self._lock:
            self._events += events
            del self._events[:-MOST_EVENTS]

    def flush(self, agents: Iterable[Agent]) -> list[Agent]:
        """Write all that waits in one transaction; return whose rows were written.  No agent's lock is held."""
        late = []
        for agent in agents:
            if agent.dirty:
                with agent.lock:
                    agent.dirty = False
                    late.append((agent, agent.row))
        with self._lock:
            events, self._events = self._events, []
        if not late and not events:
            return []
        try:
            self._store.save([row for _, row in late], events)
        except DispatcherError as error:
            _log.error("What happened cannot be written down yet: %s", error)
            with self._lock:
                self._events = events + self._events
            for agent, _ in late:
                agent.dirty = True
            return []
        return [agent for agent, _ in late]
