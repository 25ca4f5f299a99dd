"""Observers get every event in order; one that fails or is slow delays nothing."""

import threading
import time

import pytest

from dispatcher.manager.agents.observers import ObserverQueue
from dispatcher.plugin.model import AgentEvent


class Hook:
    def __init__(self, *functions):
        self.functions = functions

    def get_hookimpls(self):
        return [Impl(function) for function in self.functions]


class Impl:
    plugin_name = "test"

    def __init__(self, function):
        self.function = function
        self.argnames = ("event",)


class Plugins:
    def __init__(self, *functions):
        self.hook = self
        self.dispatcher_agent_event = Hook(*functions)


def events(count):
    return [AgentEvent(time=n, agent="a", user="a", app="d", kind="ready") for n in range(count)]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_observers_see_everything_in_order_and_a_broken_one_harms_nobody(caplog, error):
    seen = []

    def broken(_event):
        raise error("broken")

    observers = ObserverQueue(Plugins(broken, lambda event: seen.append(event.time)))
    observers.start()
    observers.publish(events(50))
    observers.close()
    assert seen == list(range(50))
    assert "The observer of the plugin test failed" in caplog.text


def test_a_slow_observer_delays_nobody_and_loses_the_oldest(monkeypatch, caplog):
    from dispatcher.manager.agents import observers as module

    monkeypatch.setattr(module, "MAX_WAITING", 5)
    called, gate, seen = threading.Event(), threading.Event(), []
    observers = ObserverQueue(Plugins(lambda event: (called.set(), gate.wait(5), seen.append(event.time))))
    observers.start()
    observers.publish(events(1))
    assert called.wait(10)
    before = time.monotonic()
    observers.publish(events(100))
    assert time.monotonic() - before < 1
    gate.set()
    observers.close()
    assert seen == [0, 95, 96, 97, 98, 99]
    assert "too slow: 95 events" in caplog.text
