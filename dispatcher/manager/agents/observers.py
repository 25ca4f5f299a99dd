"""Hands events of agents to the plugins that observe them (`dispatcher_agent_event`), in a thread of its own.

Observers are called one after the other; an exception is logged, and a slow observer delays only the later ones.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

from dispatcher.config.plugins import Plugins
from dispatcher.plugin.model import AgentEvent

MAX_WAITING = 10_000

_log = logging.getLogger("dispatcher.manager")


class ObserverQueue:
    """A queue of events and its thread."""

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
        """Queue events; the oldest are dropped when observers are too far behind."""
        with self._changed:
            for event in events:
                if len(self._waiting) >= MAX_WAITING:
                    self._waiting.popleft()
                    self._lost += 1
                self._waiting.append(event)
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
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                event = self._waiting.popleft()
                lost, self._lost = self._lost, 0
            if lost:
                _log.warning("Observers are too slow: %d events were dropped", lost)
            self._hand_over(event)

    def _hand_over(self, event: AgentEvent) -> None:
        for observer in self._plugins.hook.dispatcher_agent_event.get_hookimpls():
            try:
                observer.function(*[event for _ in observer.argnames])
            except BaseException:  # also SystemExit, which would end this thread
                _log.exception("The observer of the plugin %s failed", observer.plugin_name)
