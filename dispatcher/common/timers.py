"""Calls at a later time, on the boot clock."""

from __future__ import annotations

import logging
import sched
import threading
from collections.abc import Callable

from dispatcher.plugin.deadline import boottime

_log = logging.getLogger("dispatcher.manager")


class Timers:
    """One thread that calls quick functions at their times.  What they raise is logged.

    :param name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._scheduler = sched.scheduler(boottime)
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        """Call once, in so many seconds."""
        self._scheduler.enter(max(0.0, seconds), 0, self._call, (call,))
        self._changed.set()

    def every(self, seconds: float, call: Callable[[], object]) -> None:
        """Call repeatedly, each time so many seconds after the last call ended."""

        def run() -> None:
            self._call(call)
            self.every(seconds, call)

        self.after(seconds, run)

    def close(self) -> None:
        """Make no more calls; wait a little for the call in progress."""
        self._closed = True
        self._changed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2.0)

    def _call(self, call: Callable[[], object]) -> None:
        if not self._closed:
            try:
                call()
            except BaseException:  # SystemExit too: it would end the thread
                _log.exception("A timer's call failed")

    def _work(self) -> None:
        while not self._closed:
            self._changed.clear()
            self._changed.wait(self._scheduler.run(blocking=False))
