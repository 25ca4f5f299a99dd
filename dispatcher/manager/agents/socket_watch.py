"""Waiting until a file appears in a directory: the socket of an app that starts.

Polling every few milliseconds, for many agents that start at the same time, was a fifth of the CPU time of their
starts.  Each thread keeps its inotify descriptor for the next start: closing one takes tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inotify_simple import INotify

_thread = threading.local()


@contextlib.contextmanager
def watch_directory(directory: str) -> Iterator[Callable[[float], bool]]:
    """Watch a directory inside the block; one at a time in each thread.

    Yields a function that waits at most so many seconds and returns whether a file has appeared since its last
    call.

    :raises OSError: there is no such directory, or the kernel has no watch left for this user.
    """
    from inotify_simple import INotify, flags  # loaded at the first start of an agent, not at the manager's

    kept: _Kept | None = getattr(_thread, "kept", None)
    if kept is None:
        kept = _thread.kept = _Kept(INotify())
    inotify = kept.inotify
    number = inotify.add_watch(directory, flags.CREATE | flags.MOVED_TO | flags.ONLYDIR | flags.DONT_FOLLOW)
    try:
        yield lambda seconds: bool(inotify.read(timeout=int(seconds * 1000)))
    finally:
        inotify.rm_watch(number)
        inotify.read(timeout=0)


class _Kept:
    """The descriptor of a thread, closed when the thread ends."""

    def __init__(self, inotify: INotify) -> None:
        self.inotify = inotify

    def __del__(self) -> None:
        self.inotify.close()
