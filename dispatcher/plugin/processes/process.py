"""Processes of this host, children or not, identified by pid and start time, and signalled through pidfds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

_DEAD = frozenset("ZXx")
_STEP = 0.2  # seconds between calls of `on_wait`


@dataclass(frozen=True, slots=True)
class Process:
    """A process, identified by pid and start time (clock ticks after boot); a pid alone may be reused."""

    pid: int
    start: int

    @property
    def lives(self) -> bool:
        """Whether it is alive; a zombie is not."""
        found = process_stat(self.pid)
        return found is not None and found.start == self.start and not found.dead

    def open(self) -> int | None:
        """Return a pidfd, None if the process is gone.

        :raises OSError: no descriptor is available.
        """
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        found = process_stat(self.pid)
        if found is None or found.start != self.start:
            os.close(fd)
            return None
        return fd

    def send(self, number: int) -> bool:
        """Send a signal; False when the process is gone."""
        try:
            fd = self.open()
        except OSError:  # no descriptor left: signal the pid, checked a moment before
            if self.lives:
                with contextlib.suppress(OSError):
                    os.kill(self.pid, number)
                    return True
            return False
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def wait(self, seconds: float, on_wait: Callable[[], None] = lambda: None) -> bool:
        """Wait until it has ended, whichever process is its parent; False if it still lives after `seconds`.

        :param on_wait: called several times a second; may raise.
        """
        end = time.monotonic() + seconds
        poll = select.poll()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # without a descriptor: by polling
            fd = self.open()
            if fd is not None:
                stack.callback(os.close, fd)
                poll.register(fd, select.POLLIN)
            while self.lives:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                on_wait()
                poll.poll(min(_STEP, left) * 1000)
            return True
        while self.lives and time.monotonic() < end:
            on_wait()
            time.sleep(0.02)
        return not self.lives


@dataclass(frozen=True, slots=True)
class ProcessStat(Process):
    """A few fields of ``/proc/PID/stat``; `cpu` in clock ticks."""

    state: str
    parent: int
    cpu: int

    @property
    def dead(self) -> bool:
        """Whether it has ended: a zombie executes nothing."""
        return self.state in _DEAD

    @property
    def process(self) -> Process:
        """The process alone."""
        return Process(self.pid, self.start)


def process_stat(pid: int) -> ProcessStat | None:
    """Return the state of a process, None if the pid does not exist."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.readall()
        fields = text[text.rindex(b")") + 2 :].split()
    except (OSError, ValueError):
        return None
    return ProcessStat(
        pid=pid,
        start=int(fields[19]),
        state=fields[0].decode(),
        parent=int(fields[1]),
        cpu=int(fields[11]) + int(fields[12]),
    )


def exit_reason(code: int | None, *, out_of_memory: bool = False) -> str:
    """Describe why an app ended by itself, for `Observation.exit_reason`.

    :param code: its exit code; -N, or 128 + N from a process between: killed by signal N; None: unknown.
    :param out_of_memory: the kernel has killed a process of the agent for memory.
    """
    if code is None:
        return "ended, reason unknown"
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL and out_of_memory:
        return "out of memory"
    try:
        return f"killed by signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"exit code {code}"
