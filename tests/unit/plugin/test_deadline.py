"""Time that does not jump."""

import time

import pytest

from dispatcher.plugin import deadline as clock
from dispatcher.plugin.deadline import Deadline, SteadyWallClock


@pytest.fixture
def boot(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(clock, "boottime", lambda: now[0])
    return now


def test_a_deadline_counts_down_to_zero_and_no_further(boot):
    deadline = Deadline(5)
    assert deadline.remaining() == 5
    assert not deadline.expired
    boot[0] += 7
    assert deadline.remaining() == 0
    assert deadline.expired


def test_a_deadline_ignores_the_wall_clock(boot, monkeypatch):
    deadline = Deadline(5)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert deadline.remaining() == 5


@pytest.mark.parametrize(("seconds", "left"), [(3, 3), (5, 5), (50, 5)])
def test_bounded_is_never_later(boot, seconds, left):
    assert Deadline(5).bounded(seconds).remaining() == left


def test_bounded_of_an_expired_deadline_is_expired(boot):
    assert Deadline(-1).bounded(10).expired


def test_the_steady_clock_goes_on_when_the_wall_clock_jumps(boot, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    steady = SteadyWallClock()
    assert steady.now() == 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: 1_900_000_000.0)
    boot[0] += 60
    assert steady.now() == 1_800_000_060.0


def test_the_steady_clock_survives_a_restart(boot):
    first = SteadyWallClock()
    assert SteadyWallClock(first.offset).now() == first.now()


def test_the_kernel_s_clocks_are_there():
    assert clock.boottime() > 0
    assert len(clock.boot_id()) == 36
    assert clock.boot_id() == clock.boot_id()
