"""Calls at a later time, in order, contained."""

import threading
import time

import pytest

from dispatcher.manager.agents.observers import ObserverQueue
from dispatcher.common.timers import Timers
from dispatcher.plugin.model import AgentEvent


@pytest.fixture
def timers():
    made = Timers("test-timers")
    made.start()
    yield made
    made.close()


def test_calls_come_in_the_order_of_their_times(timers):
    order, done = [], threading.Event()
    timers.after(0.06, lambda: (order.append("late"), done.set()))
    timers.after(0.02, lambda: order.append("early"))
    timers.after(-5, lambda: order.append("now"))
    assert done.wait(5)
    assert order == ["now", "early", "late"]


def test_a_call_that_fails_is_logged_and_a_regular_one_goes_on(timers, caplog):
    count, done = [], threading.Event()

    def call():
        count.append(1)
        if len(count) == 3:
            done.set()
        raise RuntimeError("broken")

    timers.every(0.01, call)
    assert done.wait(5)
    assert "A timer's call failed" in caplog.text


def test_after_closing_nothing_is_called(timers):
    called = []
    timers.every(0.01, lambda: called.append(1))
    time.sleep(0.03)
    timers.close()
    before = len(called)
    timers.after(0, lambda: called.append(1))
    time.sleep(0.03)
    assert len(called) == before


# --- observers


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
