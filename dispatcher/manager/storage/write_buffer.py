"""A write-behind buffer for agents' rows and events.

Memory is ahead of the database for a moment: after a sweep over many agents, and while the disk is full or the
database is locked.  `flush` writes everything that waits in one transaction.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from dispatcher.manager.storage.agents import Store
from dispatcher.manager.storage.rows import AgentRow
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import AgentEvent

MAX_EVENTS = 100_000  # beyond it the oldest are dropped: a disk may stay full for days

_log = logging.getLogger("dispatcher.manager")


class WriteBuffer:
    """The newest unwritten row of each agent, and unwritten events."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: dict[int, AgentRow] = {}
        self._events: list[tuple[int, AgentEvent]] = []
        self._lock = threading.Lock()

    def add(self, row: AgentRow, events: Iterable[tuple[int, AgentEvent]] = ()) -> None:
        """Write a row and events at the next `flush`."""
        with self._lock:
            self._rows[row.id] = row
            self._events += events
            del self._events[:-MAX_EVENTS]

    def holds(self, row: AgentRow) -> bool:
        """Whether a row of the same agent waits to be written."""
        return row.id in self._rows

    def flush(self) -> list[AgentRow]:
        """Write everything that waits in one transaction; return the rows written.

        A row older than the stored one has no effect (`Store.save`).
        """
        with self._lock:
            rows, self._rows = self._rows, {}
            events, self._events = self._events, []
        if not rows and not events:
            return []
        try:
            self._store.save(rows.values(), events)
        except DispatcherError as error:
            _log.error("Changes cannot be written yet: %s", error)
            with self._lock:
                self._rows = rows | self._rows
                self._events = events + self._events
            return []
        return list(rows.values())
