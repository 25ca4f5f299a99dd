"""Hands events of agents to those that observe them (`dispatcher_agent_event`): plugins, and the log.

Observers are called one after the other in a thread of its own; an exception is logged, and a slow observer delays
only the later ones.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

from dispatcher.common.log import logger
from dispatcher.config.plugins import Plugins
from dispatcher.manager.agents.lifecycle import EventKind
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import AgentEvent

MAX_WAITING = 10_000
_WARNINGS = frozenset({EventKind.FAILED, EventKind.DIED, EventKind.OUT_OF_MEMORY, EventKind.UNREACHABLE})

_log = logging.getLogger("dispatcher.manager")


class EventLog:
    """An observer that logs every event.

    :param log: with `info` and `warning`, as `dispatcher.common.log` returns it.
    """

    def __init__(self, log: Any = None) -> None:
        self._log = log or logger("manager.agents")

    @hookimpl
    def dispatcher_agent_event(self, event: AgentEvent) -> None:
        """Log one event; failures as a warning."""
        write = self._log.warning if event.kind in _WARNINGS else self._log.info
        write(event.kind, agent=event.agent, app=event.app, **({"detail": event.detail} if event.detail else {}))


class ObserverQueue:
    """A bounded queue of events and its thread; the oldest are dropped when observers are too far behind."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._waiting: deque[AgentEvent] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._lost = 0
        self._thread = threading.Thread(target=self._work, name="dispatcher-observers", daemon=True)

    def start(self) -> None:
        """Begin to call observers."""
        self._thread.start()

    def publish(self, events: Iterable[AgentEvent]) -> None:
        """Queue events."""
        with self._changed:
            self._waiting.extend(events)
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._lost += 1
            self._changed.notify()

    def close(self) -> None:
        """Hand over waiting events for up to two seconds, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                event = self._waiting.popleft()
                lost, self._lost = self._lost, 0
            if lost:
                _log.warning("Observers are too slow: %d events were dropped", lost)
            for observer in self._plugins.hook.dispatcher_agent_event.get_hookimpls():
                try:
                    observer.function(*[event for _ in observer.argnames])
                except BaseException:  # also SystemExit, which would end this thread
                    _log.exception("The observer of the plugin %s failed", observer.plugin_name)
