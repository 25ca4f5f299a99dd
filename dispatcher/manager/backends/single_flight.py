"""At most one run at a time; requests during a run cause exactly one more."""

from __future__ import annotations

import enum
import threading


class _Run(enum.Enum):
    IDLE = enum.auto()
    RUNNING = enum.auto()
    AGAIN = enum.auto()  # requested once more meanwhile


class SingleFlight:
    """The state of one repeated job."""

    def __init__(self) -> None:
        self._run = _Run.IDLE
        self._lock = threading.Lock()

    @property
    def running(self) -> bool:
        """Whether a run is in progress."""
        return self._run is not _Run.IDLE

    def begin(self) -> bool:
        """Request a run; return whether the caller is to do it, as none is in progress."""
        with self._lock:
            idle = self._run is _Run.IDLE
            self._run = _Run.RUNNING if idle else _Run.AGAIN
            return idle

    def end(self) -> bool:
        """End the run; return whether another one was requested meanwhile."""
        with self._lock:
            again = self._run is _Run.AGAIN
            self._run = _Run.IDLE
            return again
