"""A thread that detects the end of agents, and of the log collector, within milliseconds (pidfds, epoll)."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

from dispatcher_subprocess.procfs import Process


class Watcher:
    """Watches processes, children of this one or not, and calls back from its own thread.

    :param ended: called with the agent's backend name.
    :param collector_ended: called when the log collector ended.
    """

    def __init__(
        self, ended: Callable[[str], None], collector_ended: Callable[[], None], log: logging.Logger
    ) -> None:
        self._ended = ended
        self._collector_ended = collector_ended
        self._log = log
        self._poll = select.epoll()
        self._lock = threading.Lock()
        self._agents: dict[int, tuple[str, Process]] = {}  # pidfd -> backend name, process
        self._watched: set[tuple[str, Process]] = set()
        self._collector = -1
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="subprocess-watcher", daemon=True)
        self._thread.start()

    def add(self, name: str, process: Process) -> bool:
        """Watch a process of an agent; False when it has ended already."""
        key = (name, process)
        with self._lock:
            if self._closed or key in self._watched:
                return True
            try:
                fd = process.open()
            except OSError as error:
                self._log.warning("the end of %s will be detected late: %s", name, error)
                return True
            if fd is None:
                return False
            self._agents[fd] = key
            self._watched.add(key)
            self._poll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
        return True

    def watch_collector(self, fd: int | None) -> None:
        """Watch the log collector's connection (a copy of its descriptor)."""
        with self._lock:
            if self._collector >= 0:
                self._poll.unregister(self._collector)  # closing a copy alone would leave it in the epoll set
                os.close(self._collector)
                self._collector = -1
            if fd is not None and not self._closed:
                self._collector = os.dup(fd)
                self._poll.register(self._collector, select.EPOLLRDHUP | select.EPOLLONESHOT)

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
                try:
                    self._handle(fd)
                except Exception:
                    self._log.exception("cannot handle the end of a process")
        with self._lock:
            for fd in filter(lambda fd: fd >= 0, [*self._agents, self._wake, self._collector]):
                os.close(fd)
            self._collector = -1
            self._poll.close()

    def _handle(self, fd: int) -> None:
        with self._lock:
            agent = self._agents.pop(fd, None)
            is_collector = fd == self._collector
            if agent:
                self._watched.discard(agent)
                os.close(fd)
        if agent:
            self._ended(agent[0])
        elif is_collector:
            self._collector_ended()
