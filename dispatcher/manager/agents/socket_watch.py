"""Waiting until something appears in a directory: the socket of an app that starts.  Touches inotify(7).

To look every few milliseconds, for many that start at the same time, was a fifth of what their starts cost.
Each thread keeps its descriptor for the next start: to close one makes the kernel wait for tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

_CREATE, _MOVED_TO = 0x100, 0x80
_ONLYDIR, _DONT_FOLLOW = 0x01000000, 0x02000000

_mine = threading.local()


@contextlib.contextmanager
def arrivals(directory: str) -> Iterator[Callable[[float], bool]]:
    """Watch a directory inside the block; one at a time in each thread.

    Yields a function that waits at most so many seconds and returns whether something has come since it was
    last called.

    :raises OSError: there is no such directory, or the kernel has no watch left for this user.
    """
    known: _Inotify | None = getattr(_mine, "inotify", None)
    if known is None:
        known = _mine.inotify = _Inotify()
    number = known.add(directory)
    try:
        yield known.wait
    finally:
        known.remove(number)


class _Inotify:
    """One inotify descriptor; goes with its thread."""

    def __init__(self) -> None:
        self._fd = -1
        self._libc = _libc()
        self._fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)  # IN_CLOEXEC and IN_NONBLOCK are these
        if self._fd < 0:
            raise OSError("the kernel has no inotify descriptor left for this user")
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def add(self, directory: str) -> int:
        """Watch a directory and return the watch's number."""
        wanted = _CREATE | _MOVED_TO | _ONLYDIR | _DONT_FOLLOW
        number = int(self._libc.inotify_add_watch(self._fd, os.fsencode(directory), wanted))
        if number < 0:
            raise OSError(f"{directory} cannot be watched")
        return number

    def remove(self, number: int) -> None:
        """Watch it no more, and forget what it told."""
        self._libc.inotify_rm_watch(self._fd, number)
        self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Return whether something came."""
        if not self._poll.poll(seconds * 1000):
            return False
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._fd, 65536)) > 65000:
                pass
        return True


@functools.cache
def _libc() -> Any:
    import ctypes  # loaded at the first start of an agent, not at the manager's

    return ctypes.PyDLL(None)
