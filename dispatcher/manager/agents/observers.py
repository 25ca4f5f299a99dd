"""Hands events of agents to those that observe them (`dispatcher_agent_event`): plugins, the metrics and the log.

Each observer has a bounded queue and a thread of its own: one that raises, hangs or is slow affects no other.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dispatcher.common.contained import PluginRef, contained
from dispatcher.common.humanize import duration
from dispatcher.common.log import logger
from dispatcher.config.plugins import Plugins
from dispatcher.manager.agents.lifecycle import EventKind
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import AgentEvent

MAX_WAITING = 10_000  # events for one observer
CLOSE = 2.0  # seconds for waiting events at the end
SLOW = 10.0  # seconds after which a call counts as hanging
QUIET = 60.0  # seconds between two lines of the log about lost events
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


@dataclass(frozen=True, slots=True)
class ObserverState:
    """How an observer keeps up.

    :ivar waiting: events; :ivar lost: events since the start of the manager; :ivar busy: seconds that its present
        call has taken so far; :ivar failures: calls that raised.
    """

    waiting: int
    lost: int
    busy: float
    failures: int

    @property
    def problem(self) -> str:
        """In a sentence what is wrong, or ""."""
        if self.busy > SLOW:
            return (
                f"it has not returned for {duration(self.busy)}: {self.waiting} events wait, {self.lost} are lost"
            )
        return f"{self.lost} events are lost, as it was too slow" if self.lost and self.waiting else ""


class _Observer:
    """The queue and the thread of one observer; the oldest events are dropped when it is too far behind."""

    def __init__(self, plugin: PluginRef, call: Callable[[AgentEvent], object]) -> None:
        self._plugin = plugin
        self._call = call
        self._waiting: deque[AgentEvent] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._lost = 0
        self._failures = 0
        self._since = 0.0  # boot time; 0: no call is in progress
        self._told = -QUIET
        self.thread = threading.Thread(target=self._work, name=f"dispatcher-{plugin.name}", daemon=True)

    @property
    def state(self) -> ObserverState:
        """How it keeps up."""
        since = self._since
        return ObserverState(
            len(self._waiting), self._lost, boottime() - since if since else 0.0, failures=self._failures
        )

    def publish(self, events: Iterable[AgentEvent]) -> None:
        """Queue events."""
        with self._changed:
            self._waiting.extend(events)
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._lost += 1
            tell = self._lost and boottime() - self._told > QUIET and len(self._waiting) == MAX_WAITING
            if tell:
                self._told = boottime()
            self._changed.notify()
        if tell:
            _log.warning(
                "The %s is too slow: %d events are lost so far; %s", self._plugin, self._lost, self._plugin.report
            )

    def close(self) -> None:
        """Hand over waiting events, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                event = self._waiting.popleft()
            self._since = boottime()
            try:
                with contained(self._plugin, "dispatcher_agent_event", log=None):
                    self._call(event)
            except DispatcherError as error:
                self._failures += 1
                if self._failures & (self._failures - 1) == 0:  # the first, second, fourth, ...
                    _log.exception("%s; it has failed %d times", error, self._failures, exc_info=error.__cause__)
            finally:
                self._since = 0.0


class Observers:
    """All observers of a process."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._observers: dict[str, _Observer] = {}
        self._started = False
        self.update()

    def start(self) -> None:
        """Begin to call observers."""
        self._started = True
        for observer in self._observers.values():
            observer.thread.start()

    def update(self) -> None:
        """Begin to call observers whose plugins were loaded since."""
        for each in self._plugins.hook.dispatcher_agent_event.get_hookimpls():
            if each.plugin_name not in self._observers:
                plugin = self._plugins.ref("observer", each.plugin_name)
                made = _Observer(plugin, functools.partial(_call, each))
                self._observers = {**self._observers, each.plugin_name: made}
                if self._started:
                    made.thread.start()

    @property
    def states(self) -> dict[str, ObserverState]:
        """How each observer keeps up, by the name of its plugin."""
        return {name: observer.state for name, observer in sorted(self._observers.items())}

    def publish(self, events: Iterable[AgentEvent]) -> None:
        """Queue events."""
        events = list(events)
        for observer in self._observers.values():
            observer.publish(events)

    def close(self) -> None:
        """Hand over waiting events for up to `CLOSE` seconds, and stop."""
        deadline = Deadline(CLOSE)
        for observer in self._observers.values():
            observer.close()
        for observer in self._observers.values():
            if observer.thread.is_alive():
                observer.thread.join(deadline.remaining())


def _call(implementation: Any, event: AgentEvent) -> None:
    implementation.function(*[event for _ in implementation.argnames])
