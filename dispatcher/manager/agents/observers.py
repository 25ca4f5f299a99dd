"""What happened, told to observers.  Touches plugins in a thread of its own.

Observers (`dispatcher_agent_event`) are called in order, one after the other, each contained; a slow one
delays nobody but the observers after it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

from dispatcher.config.plugins import Plugins
from dispatcher.plugin.model import AgentEvent

MOST_WAITING = 10_000

_log = logging.getLogger("dispatcher.manager")


class History:
    """A queue of events and the thread that hands them to the plugins."""

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

    def tell(self, events: Iterable[AgentEvent]) -> None:
        """Queue events; the oldest are lost when observers are hopelessly behind."""
        with self._changed:
            for event in events:
                if len(self._waiting) >= MOST_WAITING:
                    self._waiting.popleft()
                    self._lost += 1
                self._waiting.append(event)
            self._changed.notify()

    def close(self) -> None:
        """Hand over what waits, as far as the observers take it within two seconds, and stop."""
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
                _log.warning("Observers are too slow: %d events were not handed to them", lost)
            self._hand_over(event)

    def _hand_over(self, event: AgentEvent) -> None:
        for observer in self._plugins.hook.dispatcher_agent_event.get_hookimpls():
            try:
                observer.function(*[event for _ in observer.argnames])
            except Exception:
                _log.exception("The observer of the plugin %s failed", observer.plugin_name)
