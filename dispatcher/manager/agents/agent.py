"""An agent in memory: its stored row, the operation in flight, and the threads that wait for a change."""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dispatcher.manager.agents.idle import CpuActivity
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.backends.pool import SingleFlight
from dispatcher.manager.storage.rows import AgentRow
from dispatcher.manager.storage.states import Kind
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import Cancelled
from dispatcher.plugin.model import Handle


class Status(enum.Enum):
    """Whether an operation is still wanted."""

    ACTIVE = enum.auto()
    CANCELLED = enum.auto()  # a newer command contradicts it
    ABANDONED = enum.auto()  # a provider's call hangs: the result is ignored


class Operation:
    """One operation in flight, and its progress as shown to people.

    :ivar since: Unix time; :ivar stage: a short text.
    :ivar observe_again: the backend reported a change of the agent meanwhile.
    """

    def __init__(self, kind: Kind, since: float) -> None:
        self.kind = kind
        self.since = since
        self.status = Status.ACTIVE
        self.stage = ""
        self.detail = ""
        self.fraction: float | None = None
        self.observe_again = False
        self._ended = threading.Event()

    def cancel(self) -> None:
        """Ask the operation to end: `check` raises from now on."""
        if self.status is Status.ACTIVE:
            self.status = Status.CANCELLED
        self._ended.set()

    def abandon(self) -> None:
        """Ignore the operation from now on."""
        self.status = Status.ABANDONED

    def wait_for_cancel(self, seconds: float) -> None:
        """Sleep, but not beyond a cancellation."""
        self._ended.wait(seconds)

    def check(self) -> None:
        """Return while the operation is wanted.

        :raises Cancelled: it was cancelled or abandoned.
        """
        if self.status is not Status.ACTIVE:
            raise Cancelled("The operation was cancelled", why="a newer command contradicts it")


class Availability(enum.Enum):
    """Whether operations may begin."""

    FREE = enum.auto()
    RESERVED = enum.auto()  # its data is in use outside of operations
    STUCK = enum.auto()  # a provider's call for it hangs
    GONE = enum.auto()  # it was removed


class Agent:
    """One agent.  `row` and `operation` change only while `lock` is held; both may be read at any time.

    :ivar state: the public one, to detect a change; :ivar epoch: counts operations begun and ended: an observation
        from an earlier epoch is stale.
    :ivar stdin: the credentials of the sign-in, until the agent is ready.
    :ivar reason: why the manager itself changed the desired state, for the event that follows.
    :ivar oom_kills: processes of this run that the kernel killed for memory, as far as reported; None: unknown.
    :ivar notice: what its user should know while it runs, and until which Unix time.
    :ivar last_used: newer than the row's, which is written in batches.
    """

    def __init__(self, row: AgentRow) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.row = row
        self.operation: Operation | None = None
        self.availability = Availability.FREE
        self.state: State | None = None
        self.epoch = 0
        self.observing = SingleFlight()
        self.stdin: bytes | None = None
        self.reason = ""
        self.last_used = row.last_used
        self.cpu = CpuActivity()
        self.oom_kills: int | None = None
        self.notice = ("", 0.0)
        self._checked = 0.0  # boot time of the last check of its endpoint

    @property
    def handle(self) -> Handle | None:
        """The agent on its backend; None before the first start."""
        return Handle.from_json(self.row.handle) if self.row.handle else None

    @property
    def stuck(self) -> bool:
        """Whether a provider's call for it hangs."""
        return self.availability is Availability.STUCK

    @property
    def gone(self) -> bool:
        """Whether it was removed."""
        return self.availability is Availability.GONE

    def may_check(self, interval: float) -> bool:
        """Whether the last check is at least `interval` seconds ago; if so, this counts as one."""
        now = boottime()
        if now - self._checked < interval:
            return False
        self._checked = now
        return True

    @contextmanager
    def reserved(self) -> Iterator[bool]:
        """Keep operations from beginning inside the block; yields False when that is impossible now."""
        with self.lock:
            free = self.operation is None and self.availability is Availability.FREE
            if free:
                self.availability = Availability.RESERVED
        try:
            yield free
        finally:
            if free:
                with self.lock:
                    self.availability = Availability.FREE
