"""The totals of a worker since its start, for the metrics."""

from __future__ import annotations

from dispatcher.proxy.edge.routing.table import Agent

_CLASSES = tuple(f"{digit}xx" for digit in range(10))  # apps also send statuses above 599
_MAX_NAMES = 150


class Counters:
    """Requests by app (or agent) and class of status, and other events.

    :ivar refused: requests that were not valid HTTP; :ivar invalid: answers that were not.
    """

    def __init__(self, *, by_agent: bool) -> None:
        self._by_agent = by_agent
        self._rows: dict[str, list[int]] = {}
        self._edge = self._row("edge")
        self.connections = self.refused = self.invalid = self.wakes = 0

    def count(self, agent: Agent | None, status: int) -> None:
        """Count one exchange; without an agent the edge itself answered."""
        if agent is None:
            self._edge[status // 100] += 1
            return
        row = agent.counters
        if row is None:
            name = "portal" if not agent.name else agent.name if self._by_agent else agent.app
            row = agent.counters = self._row(name)
        row[status // 100] += 1

    def _row(self, name: str) -> list[int]:
        if name not in self._rows and len(self._rows) >= _MAX_NAMES:
            name = "other"
        return self._rows.setdefault(name, [0] * len(_CLASSES))

    def values(self) -> dict[str, float]:
        """Return the totals by name: ``requests_total{app="notebook",class="2xx"}`` and plain ones."""
        label = "agent" if self._by_agent else "app"
        totals: dict[str, float] = {
            "connections_total": self.connections,
            "requests_refused_total": self.refused,
            "answers_invalid_total": self.invalid,
            "wakes_total": self.wakes,
        }
        for name, row in self._rows.items():
            for kind, number in zip(_CLASSES, row, strict=True):
                if number:
                    totals[f'requests_total{{{label}="{name}",class="{kind}"}}'] = number
        return totals
