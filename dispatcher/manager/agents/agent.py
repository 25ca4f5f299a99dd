"""An agent in memory: its stored row, the operation in flight, and who waits for it.  Touches locks only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dispatcher.manager.agents.lifecycle import Kind, State
from dispatcher.manager.storage.agents import AgentRow
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import Cancelled
from dispatcher.plugin.model import Handle


class Operation:
    """Something that is being done to an agent.

    :ivar since: Unix time; :ivar stage: short words; :ivar cancel: set when a newer intent contradicts it.
    :ivar abandoned: a provider's call hangs: whatever comes of it is ignored.
    """

    __slots__ = ("abandoned", "cancel", "detail", "fraction", "kind", "nudged", "shown", "since", "stage", "told")

    def __init__(self, kind: Kind, since: float) -> None:
        self.kind = kind
        self.since = since
        self.stage = ""
        self.detail = ""
        self.fraction: float | None = None
        self.cancel = threading.Event()
        self.abandoned = False
        self.nudged = False  # the backend reported a change: look again
        self.told = 0.0  # boot time of the last announcement of progress
        self.shown: tuple[str, str, float | None] = ("", "", None)  # what it said

    def check(self) -> None:
        """Go on, or not.

        :raises Cancelled: a newer intent contradicts the operation, or nobody waits for it any more.
        """
        if self.cancel.is_set() or self.abandoned:
            raise Cancelled("The operation was cancelled", why="something else is wanted now")


class Agent:
    """One agent.  `row` and `operation` change only while `lock` is held; both may be read at any time.

    :ivar epoch: counts operations begun and ended: what was observed in an earlier one is stale.
    :ivar stuck: a provider's call for it hangs; :ivar busy: somebody works on its data outside of operations.
    :ivar stdin: the login's credentials, until the agent is ready.
    :ivar last_used: newer than the row's, which is written now and then.
    """

    def __init__(self, row: AgentRow) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.row = row
        self.operation: Operation | None = None
        self.state: State | None = None  # the public one, to know when it changes
        self.epoch = 0
        self.stuck = False
        self.busy = False
        self.gone = False
        self.dirty = False  # memory is ahead of the database
        self.observing = 0  # 1: an observation is under way, 2: another one shall follow it
        self.looked = 0.0  # boot time of the last suspicion
        self.stdin: bytes | None = None
        self.reason = ""  # why the dispatcher itself wants what it wants, for the event that follows
        self.last_used = row.last_used
        self.cpu: tuple[float, float] | None = None  # boot time and CPU seconds of the last sample
        self.judged = float("-inf")  # boot time at which two samples were last compared
        self.worked = float("-inf")  # boot time at which it was last seen to use the CPU

    @property
    def handle(self) -> Handle | None:
        """Where it is on its backend; None before the first start."""
        return Handle.from_json(self.row.handle) if self.row.handle else None

    def quiet(self, seconds: float) -> bool:
        """Whether nobody looked at it for so long; if so, this counts as a look."""
        now = boottime()
        if now - self.looked < seconds:
            return False
        self.looked = now
        return True

    @contextmanager
    def reserved(self) -> Iterator[bool]:
        """Keep operations from beginning inside the block; yields False when one is in flight."""
        with self.lock:
            free = self.operation is None and not self.stuck and not self.busy
            self.busy = self.busy or free
        try:
            yield free
        finally:
            if free:
                with self.lock:
                    self.busy = False
