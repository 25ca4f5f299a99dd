"""Threads for a provider: bounded, urgent work first, hung calls left behind."""

import threading
import time

import pytest

from dispatcher.common.contained import PluginRef
from dispatcher.plugin.deadline import Deadline
from dispatcher.manager.backends import pool as module
from dispatcher.manager.backends.pool import JobState, Pool, current_job


@pytest.fixture
def pool():
    made = Pool("test-pool", 2)
    yield made
    made.close()


def wait(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


def test_jobs_run_beside_each_other_up_to_the_size(pool):
    running, most, lock, done = [0], [0], threading.Lock(), []

    def job():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
            done.append(1)

    for _ in range(20):
        pool.submit(job)
    wait(lambda: len(done) == 20)
    assert most[0] == 2


def test_urgent_jobs_go_first():
    pool = Pool("test-pool", 1)
    gate, order = threading.Event(), []
    pool.submit(gate.wait)
    pool.submit(lambda: order.append("patient"), urgent=False)
    pool.submit(lambda: order.append("urgent"))
    gate.set()
    wait(lambda: len(order) == 2)
    assert order == ["urgent", "patient"]
    pool.close()


def test_a_job_that_fails_harms_nobody(pool, caplog):
    done = threading.Event()
    for _ in range(5):
        pool.submit(lambda: 1 / 0)
    pool.submit(done.set)
    assert done.wait(5)
    assert "a job failed" in caplog.text


def test_who_merely_waits_gives_its_place_away():
    pool = Pool("test-pool", 1)
    gate, order = threading.Event(), []

    def waiting():
        with pool.released():
            gate.wait(5)
        order.append("waited")

    pool.submit(waiting)
    pool.submit(lambda: order.append("worked"))
    wait(lambda: order == ["worked"])
    gate.set()
    wait(lambda: order == ["worked", "waited"])
    for _ in range(3):
        pool.submit(lambda: order.append("more"))
    wait(lambda: len(order) == 5)
    pool.close()


def test_a_call_that_hangs_is_left_behind_and_told_once(monkeypatch):
    monkeypatch.setattr(module, "SLACK", 0.05)
    pool = Pool("test-pool", 1)
    gate, told, done = threading.Event(), [], threading.Event()

    def hang():
        with current_job().calling(PluginRef("provider", "fake"), "stop", Deadline(0)):
            gate.wait(10)

    job = pool.submit(hang, overdue=lambda error: told.append(str(error)))
    pool.submit(done.set)
    time.sleep(0.1)
    assert not done.is_set()
    pool.check_overdue()
    pool.check_overdue()
    assert done.wait(5)
    [error] = told
    assert "The provider fake does not return: its call stop hangs" in error
    assert job.state is not JobState.NORMAL
    gate.set()
    after = threading.Event()
    pool.submit(after.set)
    assert after.wait(5)
    assert current_job() is None
    pool.close()


def test_a_call_that_returns_while_it_is_given_up_is_named_nevertheless(monkeypatch):
    monkeypatch.setattr(module, "SLACK", 0.0)
    pool = Pool("test-pool", 1)
    gate, left, told = threading.Event(), threading.Event(), []

    def late():
        with current_job().calling(PluginRef("provider", "fake"), "stop", Deadline(0)):
            gate.wait(10)
        left.set()

    class Log:
        def error(self, *_):
            gate.set()
            left.wait(5)

    monkeypatch.setattr(module, "_log", Log())
    pool.submit(late, overdue=lambda error: told.append(str(error)))
    time.sleep(0.05)
    pool.check_overdue()
    [error] = told
    assert "The provider fake does not return: its call stop hangs" in error
    pool.close()


def test_a_deadline_that_moves_on_keeps_a_call(monkeypatch):
    monkeypatch.setattr(module, "SLACK", 0.0)
    pool = Pool("test-pool", 1)
    deadline, gate, told = Deadline(0.05), threading.Event(), []

    def follow():
        with current_job().calling("fake.logs", deadline):
            gate.wait(10)

    pool.submit(follow, overdue=lambda job: told.append(job))
    deadline.at += 60
    time.sleep(0.1)
    pool.check_overdue()
    assert told == []
    gate.set()
    pool.close()


def test_idle_threads_end(monkeypatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)
    pool = Pool("test-idle", 4)
    for _ in range(8):
        pool.submit(lambda: time.sleep(0.01))
    wait(lambda: not [thread for thread in threading.enumerate() if thread.name == "test-idle"])
    done = threading.Event()
    pool.submit(done.set)
    assert done.wait(5)
    pool.close()


def test_after_closing_nothing_begins(pool):
    pool.close()
    began = []
    pool.submit(lambda: began.append(1))
    time.sleep(0.02)
    assert began == []
    pool.join(1)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_job_that_ends_the_program_ends_no_thread(error):
    pool, done = Pool("test-pool", 1), threading.Event()

    def fail():
        raise error

    pool.submit(fail)
    pool.submit(done.set)
    assert done.wait(5)
    pool.close()
