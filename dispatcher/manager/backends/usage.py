"""What agents use, for people who ask.  Asks each backend once, beside each other, for a bounded time."""

from __future__ import annotations

import logging
import threading
from typing import Any

from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.idle import note_cpu
from dispatcher.manager.agents.lifecycle import ALIVE
from dispatcher.manager.agents.registry import Engine
from dispatcher.manager.agents.views import iso
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import Capability, Handle, Usage

ANSWER = 5.0  # seconds; who has not answered by then is left out

_log = logging.getLogger("dispatcher.manager")


class Usages:
    """Collects usage over all backends."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self, agents: list[Agent]) -> dict[str, Usage]:
        """Return the usage of those of `agents` that run or sleep and can be asked, by agent name."""
        wanted: dict[str, list[tuple[Agent, Handle]]] = {}
        for agent in agents:
            row, handle = agent.row, agent.handle
            backend = self._engine.backends.get(row.provider)
            if row.observed in ALIVE and handle is not None and Capability.USAGE in backend.capabilities:
                wanted.setdefault(row.provider, []).append((agent, handle))
        found: dict[str, Usage] = {}
        waiting = threading.Semaphore(0)
        for provider, pairs in wanted.items():
            self._ask(provider, pairs, found, waiting)
        deadline = Deadline(ANSWER)
        for _ in wanted:
            waiting.acquire(timeout=deadline.remaining())
        return dict(found)

    def _ask(
        self,
        provider: str,
        pairs: list[tuple[Agent, Handle]],
        found: dict[str, Usage],
        waiting: threading.Semaphore,
    ) -> None:
        backend = self._engine.backends.get(provider)

        def run() -> None:
            try:
                usage = backend.guard.usage([handle for _, handle in pairs], deadline=Deadline(ANSWER))
                for agent, handle in pairs:
                    if handle.name in usage:
                        found[agent.row.name] = usage[handle.name]
            except DispatcherError as error:
                _log.warning("The usage of %s's agents is not known: %s", provider, error)
            finally:
                waiting.release()

        backend.pool.submit(run)

    def memory(self) -> dict[str, Any]:
        """Return bytes: in all, on average, and by agent."""
        usage = self.collect(list(self._engine.agents.values()))
        agents = [
            {"name": name, "memory": each.memory}
            for name, each in sorted(usage.items())
            if each.memory is not None
        ]
        total = sum(agent["memory"] or 0 for agent in agents if isinstance(agent["memory"], int))
        return {"total": total, "average": total // len(agents) if agents else 0, "agents": agents}

    def top(self) -> list[dict[str, Any]]:
        """Return every agent with what it uses, the busiest first."""
        agents = [self._engine.agents[name] for name in sorted(self._engine.agents)]
        usage = self.collect(agents)
        rows = [self._line(agent, usage.get(agent.row.name, Usage())) for agent in agents]
        return sorted(rows, key=lambda row: (-(row["cpu_percent"] or 0.0), -(row["memory"] or 0)))

    def _line(self, agent: Agent, usage: Usage) -> dict[str, Any]:
        row = agent.row
        percent = None
        if usage.cpu_seconds is not None:
            share = note_cpu(agent, boottime(), usage.cpu_seconds)
            if share is None and row.started_at is not None:
                share = usage.cpu_seconds / max(1.0, self._engine.clock.now() - row.started_at)
            percent = None if share is None else round(100 * share, 1)
        return {
            "name": row.name,
            "state": self._engine.view(agent).state.value,
            "memory": usage.memory,
            "cpu_percent": percent,
            "cpu_seconds": usage.cpu_seconds,
            "last_used": iso(agent.last_used),
        }
