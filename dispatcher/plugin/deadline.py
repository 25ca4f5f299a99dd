"""Deadlines and clocks that do not jump.

Timers use `CLOCK_BOOTTIME` (it counts suspended time and ignores changes of the wall clock).  Where a
point in time must survive a restart, `SteadyWallClock` gives Unix time that advances with the boot clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dispatcher.plugin.errors import DeadlineExceeded


def boottime() -> float:
    """Seconds since boot, suspended time included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Return the kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class Deadline:
    """A point on the boot clock by which an operation must have finished."""

    __slots__ = ("at",)

    def __init__(self, seconds: float) -> None:
        self.at = boottime() + seconds

    def remaining(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self.at - boottime())

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return boottime() >= self.at

    def bounded(self, seconds: float) -> Deadline:
        """Return a deadline no later than this one and no later than `seconds` from now."""
        return Deadline(min(seconds, self.remaining()))

    @contextmanager
    def holding(self, lock: threading.Lock, what: str, *, why: str, fix: str = "") -> Iterator[None]:
        """Hold a lock.

        :raises DeadlineExceeded: with these texts, if the lock is not free in time.
        """
        if not lock.acquire(timeout=self.remaining()):
            raise DeadlineExceeded(what, why=why, fix=fix)
        try:
            yield
        finally:
            lock.release()


class SteadyWallClock:
    """Unix time that ignores jumps of the wall clock while this boot lasts.

    :param offset: `time.time() - boottime()` as stored earlier in the same boot, or None to take it now.
    """

    __slots__ = ("offset",)

    def __init__(self, offset: float | None = None) -> None:
        self.offset = time.time() - boottime() if offset is None else offset

    def now(self) -> float:
        """Seconds since the Unix epoch, steady."""
        return self.offset + boottime()
