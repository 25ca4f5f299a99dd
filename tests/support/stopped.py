"""Stop a process, so that it answers nothing: connections are accepted by the kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def stop(pid: int, seconds: float = 10.0) -> None:
    """Send SIGSTOP and return when all threads of the process have stopped (proc(5))."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + seconds
    while any(_state(task) not in "TtZX" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < end, f"process {pid} has not stopped"
        time.sleep(0.005)


@contextlib.contextmanager
def stopped(pid: int):
    """Stop a process inside the block."""
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has ended
        return "X"
