"""Calls at a later time, in order, contained."""

import threading
import time

import pytest

from dispatcher.common.timers import Timers


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
