"""Metrics: what happened is counted, hostile counters are not, agents are not named."""

from __future__ import annotations

import pytest

from dispatcher.manager.agents.observers import EventLog
from dispatcher.manager.metrics import Metrics, clean_counters
from dispatcher.plugin.model import AgentEvent


def event(kind, time, agent="alice"):
    return AgentEvent(time=time, agent=agent, user=agent, app="demo", kind=kind, detail="why")


def test_starts_are_timed_from_the_last_beginning():
    metrics = Metrics()
    for kind, time in [("starting", 1.0), ("failed", 2.0), ("starting", 5.0), ("ready", 5.3), ("ready", 9.0)]:
        metrics.dispatcher_agent_event(event(kind, time))
    text = metrics.text().decode()
    assert 'dispatcher_agent_start_seconds_count{app="demo"} 1.0' in text
    assert 'dispatcher_agent_start_seconds_bucket{app="demo",le="0.5"} 1.0' in text
    assert 'dispatcher_agent_start_seconds_bucket{app="demo",le="0.25"} 0.0' in text
    assert 'dispatcher_agent_events_total{kind="starting"} 2.0' in text
    assert "_created" not in text
    assert "alice" not in text


def test_every_outcome_of_a_sign_in_shows_from_the_beginning():
    text = Metrics().text().decode()
    for outcome in ("success", "failure", "throttled", "busy", "unavailable"):
        assert f'dispatcher_logins_total{{outcome="{outcome}"}} 0.0' in text


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"requests": 3, "bytes_total": 4.5}, {"requests": 3.0, "bytes": 4.5}),
        ({"Bad": 1, "a b": 1, 'x{y="z"} 1\n': 1, "": 1, "x" * 65: 1}, {}),
        ({"a": "1", "b": None, "c": True, "d": -1, "e": float("nan"), "f": [1]}, {}),
        ({"a": 2**2000, "b": float("inf"), "c": 1e301, "d": 2**70}, {"d": float(2**70)}),
        ({f"n{n}": n for n in range(1000)}, {f"n{n}": float(n) for n in range(200)}),
        (
            {'r_total{app="a:b",class="2xx"}': 2, 'r{app="a': 1, 'r{a="\n"}': 1, "r{}": 1},
            {'r{app="a:b",class="2xx"}': 2.0},
        ),
        ([], {}),
        (None, {}),
    ],
)
def test_only_plain_counters_of_a_worker_are_shown(given, kept):
    assert clean_counters(given) == kept


def test_the_edges_counters_keep_their_labels():
    metrics = Metrics()
    counters = clean_counters(
        {'requests_total{app="demo",class="2xx"}': 3, "websockets_open": 2, "wakes_total": 1}
    )
    metrics.watch(agents=list, gauges={}, workers=lambda: {"7": counters})
    text = metrics.text().decode()
    assert 'dispatcher_edge_requests_total{app="demo",class="2xx",worker="7"} 3.0' in text
    assert 'dispatcher_edge_websockets_open{worker="7"} 2.0' in text
    assert "# TYPE dispatcher_edge_websockets_open gauge" in text
    assert 'dispatcher_edge_wakes_total{worker="7"} 1.0' in text


def test_events_are_logged_and_failures_are_warnings():
    told = []

    class Log:
        def info(self, what, **more):
            told.append(("info", what, more))

        def warning(self, what, **more):
            told.append(("warning", what, more))

    EventLog(Log()).dispatcher_agent_event(event("ready", 1.0))
    EventLog(Log()).dispatcher_agent_event(event("died", 1.0))
    assert told == [
        ("info", "ready", {"agent": "alice", "app": "demo", "detail": "why"}),
        ("warning", "died", {"agent": "alice", "app": "demo", "detail": "why"}),
    ]
