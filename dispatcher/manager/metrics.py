"""Metrics of the manager in Prometheus' text format.

They have a registry of their own; agents are counted by state and app, never one by one.
"""

from __future__ import annotations

import enum
import re
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dispatcher.manager.agents.agent import AgentView
from dispatcher.manager.agents.lifecycle import EventKind
from dispatcher.manager.agents.observers import ObserverState
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import AgentEvent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LABEL = re.compile(r'([a-z_]{1,32})="([^"\\\x00-\x1f]{0,300})"')
_LABELS = re.compile(rf"{_LABEL.pattern}(?:,{_LABEL.pattern})*\}}")
_STARTS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
MAX_STARTING = 20_000


class LoginOutcome(str, enum.Enum):
    """How a sign-in ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    THROTTLED = "throttled"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"


class Metrics:
    """Counts events; collects gauges when it is read."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series each: when it began
        self.registry = CollectorRegistry()
        self._logins = Counter("dispatcher_logins", "Sign-ins by outcome", ["outcome"], registry=self.registry)
        for outcome in LoginOutcome:
            self._logins.labels(outcome.value)
        self._events = Counter("dispatcher_agent_events", "Events of agents", ["kind"], registry=self.registry)
        self._starts = Histogram(
            "dispatcher_agent_start_seconds",
            "From the beginning of a start to ready",
            ["app"],
            buckets=_STARTS,
            registry=self.registry,
        )
        self._starting: dict[str, float] = {}
        self._lock = threading.Lock()

    def login(self, outcome: LoginOutcome) -> None:
        """Count a sign-in."""
        self._logins.labels(outcome.value).inc()

    @hookimpl
    def dispatcher_agent_event(self, event: AgentEvent) -> None:
        """Count an event, and measure the duration of a start."""
        self._events.labels(event.kind).inc()
        with self._lock:
            began = self._starting.pop(event.agent, None)
            if event.kind == EventKind.STARTING and len(self._starting) < MAX_STARTING:
                self._starting[event.agent] = event.time
        if event.kind == EventKind.READY and began is not None:
            self._starts.labels(event.app).observe(max(0.0, event.time - began))

    def watch(
        self,
        *,
        agents: Callable[[], Iterable[AgentView]],
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        workers: Callable[[], Mapping[str, Mapping[str, float]]],
        observers: Callable[[], Mapping[str, ObserverState]] = dict,
    ) -> None:
        """Collect these when the metrics are read.

        :param gauges: name -> (help, value); :param workers: counters of each connected edge worker.
        :param observers: how each observer of events keeps up.
        """

        class OnRead(Collector):
            def describe(self) -> Iterable[Metric]:
                return ()  # they are known when they are collected

            def collect(self) -> Iterator[Metric]:
                found = GaugeMetricFamily("dispatcher_agents", "Agents by state and app", labels=["state", "app"])
                for labels, number in sorted(Tally((view.state.value, view.app) for view in agents()).items()):
                    found.add_metric(labels, number)
                yield found
                for name, (text, value) in gauges.items():
                    yield GaugeMetricFamily(f"dispatcher_{name}", text, value=value())
                yield from _observer_metrics(observers())
                yield from _worker_metrics(workers())

        self.registry.register(OnRead())

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self.registry)


def _observer_metrics(observers: Mapping[str, ObserverState]) -> Iterator[Metric]:
    waiting = GaugeMetricFamily(
        "dispatcher_observer_waiting", "Events that wait for an observer", labels=["plugin"]
    )
    lost = CounterMetricFamily(
        "dispatcher_observer_lost", "Events that an observer was too slow for", labels=["plugin"]
    )
    failed = CounterMetricFamily(
        "dispatcher_observer_failures", "Calls of an observer that raised", labels=["plugin"]
    )
    for name, state in observers.items():
        for family, value in ((waiting, state.waiting), (lost, state.lost), (failed, state.failures)):
            family.add_metric([name], value)
    yield from (waiting, lost, failed)


def _worker_metrics(workers: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for worker, counters in sorted(workers.items()):
        for key, value in sorted(counters.items()):
            name, _, rest = key.partition("{")
            labels = dict(_LABEL.findall(rest))
            family = families.get(name)
            if family is None:
                kind = GaugeMetricFamily if name.endswith("_open") else CounterMetricFamily
                family = families[name] = kind(
                    f"dispatcher_edge_{name}", "Counter of the edge workers", labels=["worker", *labels]
                )
            family.add_metric([worker, *labels.values()], value)
    yield from families.values()


#: No counter reaches this.  A larger number does not fit into a float, or a sum overflows to infinity.
LARGEST = 1e300


def clean_counters(values: object, limit: int = 200) -> dict[str, float]:
    """Return the valid counters of a worker: plain names, possibly with labels, and numbers; not too many."""
    if not isinstance(values, dict):
        return {}
    good: dict[str, float] = {}
    for name, value in list(values.items())[:limit]:
        number: Any = value
        if not isinstance(name, str) or type(number) not in {int, float} or not 0 <= number < LARGEST:
            continue
        plain, brace, labels = name.partition("{")
        if _NAME.fullmatch(plain) and (not brace or _LABELS.fullmatch(labels)):
            good[plain.removesuffix("_total") + brace + labels] = float(number)
    return good
