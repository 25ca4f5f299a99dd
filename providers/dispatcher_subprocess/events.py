"""A thread that detects the end of agents, and of the log collector, within milliseconds (pidfds, epoll)."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Hashable

from dispatcher_subprocess.procfs import Process

_END = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


class Watcher:
    """Watches processes, children of this one or not, and connections, and calls back once at the end of each.

    The callbacks run in its own thread.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._poll = select.epoll()
        self._lock = threading.Lock()
        self._fds: dict[Hashable, int] = {}  # what is watched -> descriptor
        self._ends: dict[int, tuple[Hashable, Callable[[], None]]] = {}  # descriptor -> the same, callback
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="subprocess-watcher", daemon=True)
        self._thread.start()

    def add_process(self, process: Process, ended: Callable[[], None]) -> bool:
        """Watch a process; False when it has ended already."""
        try:
            return self._add(process, process.open, ended)
        except OSError as error:
            self._log.warning("the end of process %d will be detected late: %s", process.pid, error)
            return True

    def add_connection(self, fd: int, ended: Callable[[], None]) -> None:
        """Watch a connection on which nothing arrives, by a copy of its descriptor."""
        self._add(os.fstat(fd).st_ino, lambda: os.dup(fd), ended)

    def _add(self, key: Hashable, open_: Callable[[], int | None], ended: Callable[[], None]) -> bool:
        with self._lock:
            if self._closed or key in self._fds:
                return True
            fd = open_()
            if fd is None:
                return False
            self._fds[key], self._ends[fd] = fd, (key, ended)
            self._poll.register(fd, _END)
        return True

    def close(self) -> None:
        """End the thread; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            for fd, _ in self._poll.poll():
                with self._lock:
                    key, ended = self._ends.pop(fd, (None, None))
                    if ended:
                        del self._fds[key]
                        os.close(fd)
                try:
                    if ended:
                        ended()
                except Exception:
                    self._log.exception("cannot handle the end of a process")
        with self._lock:
            for fd in (*self._ends, self._wake):
                os.close(fd)
            self._poll.close()
