"""Processes of this host, and why they ended."""

import os
import signal
import subprocess
import time

import pytest

from dispatcher.plugin import Process, exit_reason, process_stat


@pytest.mark.parametrize(
    "code, oom, reason",
    [
        (0, False, "exit code 0"),
        (1, False, "exit code 1"),
        (137, False, "killed by signal 9 (SIGKILL)"),
        (-9, False, "killed by signal 9 (SIGKILL)"),
        (137, True, "out of memory"),
        (-9, True, "out of memory"),
        (1, True, "exit code 1"),
        (139, False, "killed by signal 11 (SIGSEGV)"),
        (255, False, "exit code 255"),
        (None, True, "ended, reason unknown"),
    ],
)
def test_exit_reasons(code, oom, reason):
    assert exit_reason(code, out_of_memory=oom) == reason


@pytest.fixture
def child():
    with subprocess.Popen(["sleep", "60"]) as child:
        yield process_stat(child.pid).process
        child.kill()


def test_a_process_is_another_if_its_pid_is_used_again(child):
    assert child.lives
    other = Process(child.pid, child.start + 1)
    assert not other.lives and other.open() is None
    assert not other.send(signal.SIGKILL) and child.lives


def test_waiting_ends_with_the_process_and_with_the_time(child):
    waits = []
    assert not child.wait(0.3, lambda: waits.append(1)) and len(waits) in {2, 3}
    assert not child.wait(-1)
    began = time.monotonic()
    child.send(signal.SIGTERM)
    assert child.wait(10) and time.monotonic() - began < 5
    assert process_stat(child.pid).dead, "a zombie does not live"


def test_waiting_passes_on_what_stops_it(child):
    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        child.wait(10, stop)


def test_no_such_process():
    assert process_stat(2**22 + 1) is None
    assert not Process(2**22 + 1, 5).lives and Process(2**22 + 1, 5).wait(1)
    assert process_stat(os.getpid()).parent == os.getppid()
