"""Observers get every event in order; one that fails, hangs or is slow affects no other."""

import threading
import time
import types

import pytest

from dispatcher.config.plugins import Plugins
from dispatcher.manager.agents import observers as module
from dispatcher.manager.agents.observers import Observers
from dispatcher.manager.metrics import Metrics
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import AgentEvent


def plugins(**observers):
    found = Plugins([])
    for name, call in observers.items():

        @hookimpl
        def dispatcher_agent_event(event, call=call):
            call(event)

        found.register(name, types.SimpleNamespace(dispatcher_agent_event=dispatcher_agent_event), "acme 1")
    return found


def events(count):
    return [AgentEvent(time=n, agent="a", user="a", app="d", kind="ready") for n in range(count)]


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_observers_see_everything_in_order_and_a_broken_one_harms_nobody(caplog, error):
    seen = []

    def broken(_event):
        raise error("broken")

    observers = Observers(plugins(bad=broken, good=lambda event: seen.append(event.time)))
    observers.start()
    observers.publish(events(50))
    observers.close()
    assert seen == list(range(50))
    assert observers.states["bad"].failures == 50
    told = [record.getMessage() for record in caplog.records]
    assert "The observer bad failed in dispatcher_agent_event" in told[0]
    assert "authors of acme 1" in told[0]
    assert len(told) < 10, "a fault that repeats does not fill the log"


def test_an_observer_that_hangs_silences_no_other_and_is_told(monkeypatch):
    monkeypatch.setattr(module, "SLOW", 0.05)
    monkeypatch.setattr(module, "CLOSE", 0.1)
    gate, seen = threading.Event(), []
    observers = Observers(plugins(hangs=lambda event: gate.wait(10), good=seen.append))
    observers.start()
    observers.publish(events(20))
    until(lambda: len(seen) == 20)
    until(lambda: "it has not returned" in observers.states["hangs"].problem)
    assert "19 events wait" in observers.states["hangs"].problem
    assert observers.states["good"].problem == ""
    metrics = Metrics()
    metrics.watch(agents=list, gauges={}, workers=dict, observers=lambda: observers.states)
    assert b'dispatcher_observer_waiting{plugin="hangs"} 19.0' in metrics.text()
    before = time.monotonic()
    observers.close()
    assert time.monotonic() - before < 1
    gate.set()


def test_a_slow_observer_loses_the_oldest_and_that_is_counted(monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_WAITING", 5)
    called, gate, seen = threading.Event(), threading.Event(), []
    observers = Observers(plugins(slow=lambda event: (called.set(), gate.wait(5), seen.append(event.time))))
    observers.start()
    observers.publish(events(1))
    assert called.wait(10)
    before = time.monotonic()
    observers.publish(events(100))
    assert time.monotonic() - before < 1
    assert observers.states["slow"].lost == 95
    gate.set()
    observers.close()
    assert seen == [0, 95, 96, 97, 98, 99]
    assert "The observer slow is too slow: 95 events are lost so far" in caplog.text


def test_an_observer_that_is_loaded_later_gets_what_happens_from_then_on():
    found, seen = plugins(), []
    observers = Observers(found)
    observers.start()
    observers.publish(events(1))
    found.register(
        "late", types.SimpleNamespace(dispatcher_agent_event=hookimpl(lambda event: seen.append(event.time)))
    )
    observers.update()
    observers.publish(events(2))
    observers.close()
    assert seen == [0, 1]
