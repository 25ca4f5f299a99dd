"""A thread pool for the calls of one provider.

It grows on demand.  A job may release its place while it merely waits (`released`), and a job whose call hangs
past its deadline is *abandoned*: it keeps its thread, but no longer counts, so that one hung call does not block
others.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dispatcher.common.contained import PluginRef, shown
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DeadlineExceeded, DispatcherError

SLACK = 5.0  # seconds that a call may take beyond its deadline before it counts as hanging
IDLE_SECONDS = 10.0  # an idle thread ends after that long
MAX_RELEASED = 256  # threads that wait outside the count
MAX_ABANDONED = 256  # threads whose call hangs; beyond it they count again

_log = logging.getLogger("dispatcher.manager")
_current = threading.local()


class JobState(enum.Enum):
    """What became of a job's call."""

    NORMAL = enum.auto()
    ABANDONED = enum.auto()  # it hangs, and its caller got an error
    ABANDONED_UNCOUNTED = enum.auto()  # the same, and another job has its place


class _Call(NamedTuple):
    """A call of a plugin."""

    plugin: PluginRef
    name: str
    deadline: Deadline


class Job:
    """A function to run once.

    :ivar called: the call of a plugin that it makes at present.
    """

    __slots__ = ("called", "overdue", "run", "state")

    def __init__(self, run: Callable[[], None], overdue: Callable[[DispatcherError], None] | None) -> None:
        self.run = run
        self.overdue = overdue
        self.called: _Call | None = None
        self.state = JobState.NORMAL

    @contextmanager
    def calling(self, plugin: PluginRef, call: str, deadline: Deadline) -> Iterator[None]:
        """Name the call of a plugin that the block makes, and its deadline."""
        before, self.called = self.called, _Call(plugin, call, deadline)
        try:
            yield
        finally:
            self.called = before


def hung_call(plugin: PluginRef, call: str) -> DispatcherError:
    """Return the error for a call that did not return in time."""
    return DeadlineExceeded(
        f"The {plugin} does not return",
        why=f"its call {call} hangs past its deadline",
        fix="check its backend; the manager continues without it and calls it again when the call returns; "
        f"or {plugin.report}",
    )


def current_job() -> Job | None:
    """Return the job of this thread, None outside of pools."""
    return getattr(_current, "job", None)


class Pool:
    """Runs jobs on at most `size` threads at a time, urgent ones first.

    :param name: of the threads.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # there is work
        self._ended = threading.Condition(lock)  # a job is done
        self._urgent: deque[Job] = deque()
        self._background: deque[Job] = deque()
        self._running: set[Job] = set()
        self._threads = 0  # that count against the size
        self._idle = 0
        self._released = 0
        self._abandoned = 0
        self._closed = False

    def submit(
        self,
        run: Callable[[], None],
        *,
        overdue: Callable[[DispatcherError], None] | None = None,
        urgent: bool = True,
    ) -> Job:
        """Run a function soon.  Its exceptions are logged.

        :param overdue: called once with the error, from `check_overdue`, when a call hangs past its deadline.
        """
        job = Job(run, overdue)
        with self._changed:
            if self._closed:
                return job
            (self._urgent if urgent else self._background).append(job)
            self._start_threads()
        return job

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release this thread's place to other jobs inside the block, which only waits."""
        with self._changed:
            giving = self._released < MAX_RELEASED and current_job() is not None
            if giving:
                self._released += 1
                self._threads -= 1
                self._start_threads()
        try:
            yield
        finally:
            if giving:
                with self._changed:
                    self._released -= 1
                    self._threads += 1

    def check_overdue(self) -> None:
        """Abandon the jobs whose call hangs; called regularly by one thread."""
        now = boottime()
        overdue: list[tuple[Job, _Call]] = []
        with self._changed:
            for job in self._running:
                called = job.called  # once: the call may return meanwhile
                if job.state is JobState.NORMAL and called and called.deadline.at + SLACK < now:
                    job.state = JobState.ABANDONED
                    overdue.append((job, called))
                    if self._abandoned < MAX_ABANDONED:
                        job.state = JobState.ABANDONED_UNCOUNTED
                        self._abandoned += 1
                        self._threads -= 1
            self._start_threads()
        for job, called in overdue:
            _log.error("The %s does not return from %s; continuing without it", called.plugin, called.name)
            if job.overdue:
                job.overdue(hung_call(called.plugin, called.name))

    def close(self) -> None:
        """Begin no more jobs.  Those in progress are left to end."""
        with self._changed:
            self._closed = True
            self._urgent.clear()
            self._background.clear()
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait until no job is in progress, except abandoned ones; at most so long."""
        with self._changed:
            self._ended.wait_for(lambda: all(job.state is not JobState.NORMAL for job in self._running), seconds)

    def _start_threads(self) -> None:
        waiting = len(self._urgent) + len(self._background)
        if self._idle:
            self._changed.notify(min(waiting, self._idle))
        for _ in range(min(waiting - self._idle, self._size - self._threads)):
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._threads += 1
            try:
                thread.start()
            except RuntimeError as error:  # no memory or too many threads: the job waits
                self._threads -= 1
                _log.error("%s: no thread can be started: %s", self._name, error)
                return

    def _work(self) -> None:
        counted = True
        while job := self._next(counted):
            _current.job = job
            try:
                job.run()
            except BaseException as error:  # SystemExit too: it would end the thread, which still counts
                _log.error("%s: a job failed", self._name, exc_info=shown(error))
            finally:
                _current.job = None
                with self._changed:
                    self._running.discard(job)
                    if job.state is JobState.ABANDONED_UNCOUNTED:  # this thread is one too many
                        self._abandoned -= 1
                        counted = False
                    self._ended.notify_all()

    def _next(self, counted: bool) -> Job | None:
        with self._changed:
            if not counted:
                return None
            while not self._closed:
                if self._threads > self._size:
                    break
                if self._urgent or self._background:
                    job = (self._urgent or self._background).popleft()
                    self._running.add(job)
                    return job
                self._idle += 1
                woken = self._changed.wait(IDLE_SECONDS)
                self._idle -= 1
                if not woken and not (self._urgent or self._background):
                    break
            self._threads -= 1
            return None


class _Run(enum.Enum):
    IDLE = enum.auto()
    RUNNING = enum.auto()
    AGAIN = enum.auto()  # requested once more meanwhile


class SingleFlight:
    """A repeated job: at most one run at a time; requests during a run cause exactly one more."""

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
