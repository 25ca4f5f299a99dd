"""Agents' events in the manager's log."""

from __future__ import annotations

from typing import Any

from dispatcher.common.log import logger
from dispatcher.manager.agents.change import EventKind
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import AgentEvent

_WARNINGS = frozenset({EventKind.FAILED, EventKind.DIED, EventKind.UNREACHABLE})


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
