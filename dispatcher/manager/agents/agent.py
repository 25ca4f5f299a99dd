"""An agent in memory: its stored row, the operation in flight, the threads that wait for a change; and its view.

`AgentView.to_json` is AGENT of the REST interface, `to_feed` AGENT of the feed.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from dispatcher.manager.agents.idle import CpuActivity
from dispatcher.manager.agents.lifecycle import FeedState, Situation, State, feed_state, public_state
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.backends.pool import SingleFlight
from dispatcher.manager.files.quota import DiskUse
from dispatcher.manager.storage.rows import AgentRow, Desired, Failure, Kind, Move
from dispatcher.plugin import names
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import Cancelled
from dispatcher.plugin.model import Endpoint, Handle


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
    :ivar killed_because: why this manager killed the processes of this run, "" if it did not.
    :ivar notice: what its user should know while it runs, and until which Unix time.
    :ivar disk: what its data took when it was last measured; None: unknown.
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
        self.killed_because = ""
        self.notice = ("", 0.0)
        self.disk: DiskUse | None = None
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


def iso(time: float | None) -> str | None:
    """Return a Unix time as ISO 8601 with offset; None stays None."""
    return None if time is None else datetime.fromtimestamp(time, timezone.utc).isoformat(timespec="milliseconds")


def default_agent(user: str, views: Iterable[AgentView]) -> AgentView | None:
    """Return the agent that a user gets who has not chosen one: that of the user's name, else the oldest.

    :param views: of all agents of the user, the oldest first.
    """
    wanted = [view for view in views if view.desired is not Desired.ABSENT]
    return next((view for view in wanted if view.name == user), wanted[0] if wanted else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentView:
    """A snapshot; never changes.

    :ivar state: the public state; :ivar feed_state: the state in the feed.
    :ivar stage: of the operation in flight, "" without one; :ivar fraction: 0 to 1 if known.
    :ivar since: when `state` began; :ivar reachable: whether the backend answers; :ivar observed_at: when the
        agent was last observed.  Times are Unix seconds.
    :ivar disk: what its data takes, None if unknown.
    :ivar endpoint: while the agent runs and is ready.
    :ivar owner_uid: host user id that must own a Unix endpoint's socket; None: not checked.
    :ivar label: the agent's DNS label.
    """

    name: str
    user: str
    user_id: int
    app: str
    provider: str
    state: State
    desired: Desired
    feed_state: FeedState
    label: str
    stage: str = ""
    detail: str = ""
    fraction: float | None = None
    since: float
    failure: Failure | None = None
    outdated: bool = False
    last_used: float | None = None
    created: float
    reachable: bool = True
    observed_at: float | None = None
    move: Move | None = None
    disk: DiskUse | None = None
    endpoint: Endpoint | None = None
    owner_uid: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return AGENT of the REST interface."""
        return {
            "name": self.name,
            "user": self.user,
            "app": self.app,
            "provider": self.provider,
            "state": self.state.value,
            "desired": self.desired.value,
            "stage": self.stage,
            "detail": self.detail,
            "fraction": self.fraction,
            "since": iso(self.since),
            "failure": self.failure.to_json() if self.failure else None,
            "outdated": self.outdated,
            "last_used": iso(self.last_used),
            "created": iso(self.created),
            "reachable": self.reachable,
            "observed_at": iso(self.observed_at),
            "disk": self.disk and {"used": self.disk.used, "limit": self.disk.limit, "full": self.disk.full},
            "move": self.move
            and {
                "from": self.move.source,
                "to": self.move.target,
                "step": self.move.step,
                "since": iso(self.move.since),
            },
        }

    def to_feed(self) -> dict[str, Any]:
        """Return AGENT of the feed.  `failed` is the failure in a sentence, or null."""
        return {
            "name": self.name,
            "user": self.user,
            "user_id": self.user_id,
            "app": self.app,
            "label": self.label,
            "state": self.feed_state.value,
            "endpoint": str(self.endpoint) if self.endpoint else None,
            "uid": self.owner_uid,
            "stage": self.stage,
            "detail": "" if self.state is State.UNKNOWN else self.detail,  # the backend's error
            "fraction": self.fraction,
            "failed": self.failure.what if self.failure else None,
        }


def view_of(
    row: AgentRow,
    situation: Situation,
    operation: Operation | None,
    backend: Backend,
    *,
    outdated: bool,
    last_used: float | None,
    notice: str,
    disk: DiskUse | None,
    now: float,
) -> AgentView:
    """Return an agent's view."""
    state = public_state(situation)
    detail = operation.detail if operation else ""
    if state is State.FAILED and row.retry_at is not None:
        detail = f"the next try is in {max(0, round(row.retry_at - now))} s"
    elif state is State.UNKNOWN:
        detail = str(backend.problem)
    elif state is State.RUNNING:
        detail = notice
    observed_at = row.observed_at
    if backend.last_contact is not None and situation.reachable and row.operation is None:
        observed_at = max(backend.last_contact, observed_at or 0.0)
    fed = feed_state(situation)
    return AgentView(
        name=row.name,
        user=row.user,
        user_id=row.user_id,
        app=row.app,
        provider=row.provider,
        state=state,
        desired=row.desired,
        feed_state=fed,
        label=names.key(row.name),
        stage=operation.stage if operation else "",
        detail=detail,
        fraction=operation.fraction if operation else None,
        since=row.since,
        failure=None if row.operation else row.failure,
        outdated=outdated,
        last_used=last_used,
        created=row.created,
        reachable=situation.reachable,
        observed_at=observed_at,
        move=row.move,
        disk=disk,
        endpoint=Endpoint.parse(row.endpoint) if fed is FeedState.RUNNING and row.endpoint else None,
        owner_uid=row.owner_uid,
    )
