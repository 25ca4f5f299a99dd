"""Calls at a later time, on the boot clock."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable

from dispatcher.plugin.deadline import boottime

_log = logging.getLogger("dispatcher.manager")


class Timers:
    """One thread that calls quick functions at their times.  Their exceptions are logged.

    :param name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._heap: list[tuple[float, int, Callable[[], object], float | None]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        """Call once, in so many seconds."""
        self._add(boottime() + max(0.0, seconds), call, None)

    def every(self, seconds: float, call: Callable[[], object]) -> None:
        """Call repeatedly, each time so many seconds after the last call ended."""
        self._add(boottime() + seconds, call, seconds)

    def close(self) -> None:
        """Make no more calls; wait a little for the call in progress."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2.0)

    def _add(self, at: float, call: Callable[[], object], period: float | None) -> None:
        with self._changed:
            if not self._closed:
                heapq.heappush(self._heap, (at, next(self._order), call, period))
                self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._heap or self._heap[0][0] > boottime()):
                    self._changed.wait(self._heap[0][0] - boottime() if self._heap else None)
                if self._closed:
                    return
                _, _, call, period = heapq.heappop(self._heap)
            try:
                call()
            except Exception:
                _log.exception("A timer's call failed")
            if period is not None:
                self.every(period, call)
