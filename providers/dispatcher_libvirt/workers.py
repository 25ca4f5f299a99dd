"""Threads for calls that cannot be cancelled.  Touches threads only.

A libvirt call returns when libvirtd answers, whenever that is.  Each one runs in a daemon thread of this pool,
and its caller waits as long as its own deadline allows; then the thread is left alone until its call ends.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
IDLE = 5.0  # seconds after which an unused thread ends


class Call(Generic[_T]):
    """One call under way."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._done = threading.Event()
        self._result: _T
        self._error: BaseException | None = None

    def run(self) -> None:
        """Carry it out, in a thread of the pool."""
        try:
            self._result = self._function()
        except BaseException as error:  # carried to the caller
            # What the call held (a connection, say) ends here, not wherever the error is forgotten.
            traceback.clear_frames(error.__traceback__)
            self._error = error
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        return self._done.wait(seconds)

    def result(self) -> _T:
        """Return what it returned, or raise what it raised; only after it ended."""
        if self._error is not None:
            raise self._error
        return self._result


class Workers:
    """A pool that grows as far as `most` threads; idle ones end by themselves."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._condition = threading.Condition()
        self._queue: deque[Call[Any]] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, function: Callable[[], _T], *, always: bool = False) -> Call[_T] | None:
        """Start a call; None when every thread is busy with calls that have not ended (`always`: not then)."""
        call = Call(function)
        with self._condition:
            if self._idle <= len(self._queue):
                if self._threads >= self._most and not always:
                    return None
                self._threads += 1
                threading.Thread(target=self._work, name="libvirt-call", daemon=True).start()
            self._queue.append(call)
            self._condition.notify()
        return call

    def close(self) -> None:
        """Let threads end as soon as their calls have."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                self._condition.wait_for(lambda: self._queue or self._closed, IDLE)
                self._idle -= 1
                if not self._queue:
                    self._threads -= 1
                    return
                call = self._queue.popleft()
            call.run()
            del call
