"""The state machine of an agent, and how an observation changes its row.  Pure: no I/O, no clock, no thread.

From the desired state (`Desired`), the last observation and the operation in flight, three functions derive the
next operation (`next_operation`), the public state (`public_state`) and the state in the feed (`feed_state`); a
fourth, `superseded`, decides whether the operation in flight is still wanted.  Deaths and failures: `restarts`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dispatcher.manager.storage.rows import AgentRow, Desired, Kind, Pending
from dispatcher.plugin.model import BackendState, Observation

SAME_START = 2.0  # seconds by which two reports of one start may differ


class State(str, enum.Enum):
    """The public state."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPING = "stopping"
    FAILED = "failed"
    UNKNOWN = "unknown"
    REMOVING = "removing"


class FeedState(str, enum.Enum):
    """The state by which the edge routes (docs/reference/feed.md)."""

    RUNNING = "running"
    ASLEEP = "asleep"
    STARTING = "starting"
    STOPPING = "stopping"
    FAILED = "failed"


ASLEEP = frozenset({BackendState.SUSPENDED, BackendState.HIBERNATED})
DEAD = frozenset({BackendState.STOPPED, BackendState.ABSENT})
ALIVE = frozenset(BackendState) - DEAD
_DURING = {
    Kind.START: State.STARTING,
    Kind.MOVE: State.STARTING,
    Kind.SUSPEND: State.SUSPENDING,
    Kind.HIBERNATE: State.SUSPENDING,
    Kind.STOP: State.STOPPING,
    Kind.RESET: State.STOPPING,
    Kind.REMOVE: State.REMOVING,
}
_ASLEEP_STATES = {BackendState.SUSPENDED: State.SUSPENDED, BackendState.HIBERNATED: State.HIBERNATED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The facts from which everything about an agent is decided.

    :ivar observed: by the backend, last; :ivar ready: the health check has answered since the agent runs.
    :ivar reachable: the backend answers; :ivar operation: in flight.
    :ivar moving: the app's provider is not the one that has the agent and its data.
    :ivar failed: the last attempt to reach the desired state failed; :ivar held: no operation may begin now
        (back-off, given up, or a provider's call hangs).
    """

    desired: Desired
    observed: BackendState
    ready: bool = False
    reachable: bool = True
    operation: Kind | None = None
    pending: Pending = Pending.NONE
    moving: bool = False
    failed: bool = False
    held: bool = False

    @property
    def first(self) -> Pending:
        """The step to do before anything else; a restart matters only while the desired state is running."""
        if self.pending is Pending.RESTART and self.desired is not Desired.RUNNING:
            return Pending.NONE
        return self.pending


def reached(now: Situation) -> bool:
    """Whether the agent is in its desired state.  An agent that has ended has nothing left to suspend."""
    if now.first is not Pending.NONE or now.desired is Desired.ABSENT:
        return False
    if now.desired is Desired.RUNNING:
        return now.observed is BackendState.RUNNING and now.ready
    if now.desired is Desired.SUSPENDED:
        return now.observed in ASLEEP | DEAD
    if now.desired is Desired.HIBERNATED:
        return now.observed in DEAD | {BackendState.HIBERNATED}
    return now.observed in DEAD


def next_operation(now: Situation) -> Kind | None:
    """Return the next operation, None for none (or none yet)."""
    if now.operation is not None or now.held or reached(now):
        return None
    if now.desired is Desired.ABSENT:
        return Kind.REMOVE
    if not now.reachable:
        return None
    if now.first is Pending.RESET:
        return Kind.RESET
    if now.first is Pending.RESTART and now.observed in ALIVE:
        return Kind.STOP
    if now.desired is Desired.RUNNING:
        return Kind.MOVE if now.moving and now.observed in DEAD else Kind.START
    if now.desired is Desired.STOPPED or now.observed in DEAD:
        return Kind.STOP if now.observed in ALIVE else None
    return Kind.SUSPEND if now.desired is Desired.SUSPENDED else Kind.HIBERNATE


def superseded(operation: Kind, desired: Desired, pending: Pending) -> bool:
    """Whether an operation in flight contradicts a newer command and should be cancelled.

    Stops, resets and removals are never cancelled: the next operation begins when they are done.
    """
    if operation in {Kind.START, Kind.MOVE}:
        return desired in {Desired.STOPPED, Desired.ABSENT} or pending is not Pending.NONE
    if operation in {Kind.SUSPEND, Kind.HIBERNATE}:
        return desired not in {Desired.SUSPENDED, Desired.HIBERNATED} or pending is not Pending.NONE
    return False


def public_state(now: Situation) -> State:
    """Return the public state.

    While a backend does not answer, an agent that was not at rest is *unknown*, never *stopped*.
    """
    if now.operation is not None:
        return _DURING[now.operation]
    if now.desired is Desired.ABSENT:
        return State.REMOVING
    if not now.reachable and now.observed in ALIVE:
        return State.UNKNOWN
    if now.failed:
        return State.FAILED
    if not now.reachable and now.desired is Desired.RUNNING:
        return State.UNKNOWN
    if now.first is not Pending.NONE:
        return State.STOPPING
    if now.observed is BackendState.RUNNING and now.ready:
        return State.RUNNING
    if now.desired is Desired.RUNNING:
        return State.STARTING
    if now.observed in DEAD:
        return State.STOPPED
    return _ASLEEP_STATES.get(now.observed, State.STARTING)


def feed_state(now: Situation) -> FeedState:
    """Return the state by which the edge routes.

    An agent whose backend does not answer, or that could not be suspended, is still served.
    """
    if now.operation is not None:
        return FeedState.STARTING if now.operation in {Kind.START, Kind.MOVE} else FeedState.STOPPING
    if now.desired is Desired.ABSENT or now.first is not Pending.NONE:
        return FeedState.STOPPING
    if now.observed is BackendState.RUNNING and now.ready and now.desired is not Desired.STOPPED:
        return FeedState.RUNNING
    if now.failed:
        return FeedState.FAILED
    if now.desired is Desired.RUNNING:
        return FeedState.STARTING
    return FeedState.ASLEEP if now.observed in ASLEEP | DEAD else FeedState.STOPPING


#: No failure any more, and no retry.
CLEARED: dict[str, Any] = {"failure": None, "retry_at": None}
#: The operation in flight has ended.
NO_OPERATION: dict[str, Any] = {"operation": None, "step": "", "operation_since": None}
#: The agent does not run.
ENDED: dict[str, Any] = {
    "ready": False,
    "endpoint": "",
    "owner_uid": None,
    "started_at": None,
    "spec_hash": "",
    "exit_reason": "",
}


class EventKind(str, enum.Enum):
    """The kinds of `AgentEvent` (docs/reference/hooks.md)."""

    CREATED = "created"
    STARTING = "starting"
    READY = "ready"
    RESUMED = "resumed"
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DIED = "died"
    OUT_OF_MEMORY = "out-of-memory"
    FAILED = "failed"
    ADOPTED = "adopted"
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"
    RESET = "reset"
    MOVED = "moved"
    OUTDATED = "outdated"
    REMOVED = "removed"


class Write(enum.Enum):
    """When a change is written to the database."""

    NOW = enum.auto()  # at once; if that fails, later: the change happens anyway
    REQUIRED = enum.auto()  # at once; if that fails, nothing happens and the error is raised
    UNLESS_FULL = enum.auto()  # the same, but on a full disk the change happens and is written later
    LATER = enum.auto()  # with others in one transaction, unless an operation begins


@dataclass(frozen=True, slots=True)
class Change:
    """New values of an agent's row, with the events that report them.

    :ivar insist: begin an operation although the backend was unreachable when last called.
    :ivar urgent: a person waits for the operation that follows.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    events: Sequence[tuple[EventKind, str]] = ()
    write: Write = Write.NOW
    insist: bool = False
    urgent: bool = False


def observed(row: AgentRow, seen: Observation, now: float) -> dict[str, Any]:
    """Return the fields of a row that an observation changes.

    An agent that was ready and still runs since the same start stays ready; after another start the health check
    decides again.
    """
    ran_on = (
        row.observed is BackendState.RUNNING
        and seen.state is BackendState.RUNNING
        and (
            row.started_at is None
            or seen.started_at is None
            or abs(row.started_at - seen.started_at) <= SAME_START
        )
    )
    fields: dict[str, Any] = {"observed": seen.state, "ready": row.ready and ran_on}
    if seen.state in DEAD:
        fields |= {"endpoint": "", "owner_uid": None, "spec_hash": "", "started_at": None}
        fields["exit_reason"] = seen.exit_reason or (row.exit_reason if row.observed in DEAD else "")
    else:
        fields |= {
            "endpoint": str(seen.endpoint) if seen.endpoint else row.endpoint,
            "owner_uid": seen.owner_uid if seen.endpoint else row.owner_uid,
            "spec_hash": seen.spec_hash or row.spec_hash,
            "exit_reason": "",
        }
        if not ran_on or row.started_at is None:
            # A list may leave the start out: then the known one holds, as for an agent that was asleep.
            fields["started_at"] = row.started_at if seen.started_at is None else seen.started_at
    if any(getattr(row, name) != value for name, value in fields.items()):
        fields["observed_at"] = now
    return fields


def unchanged(row: AgentRow, seen: Observation) -> bool:
    """Whether an observation clearly contains no news: the cheap answer for most agents of a sweep."""
    if seen.state is not row.observed:
        return False
    return seen.state in DEAD or (
        seen.spec_hash in {"", row.spec_hash}
        and (row.started_at == seen.started_at or seen.started_at is None)
        and (seen.endpoint is None or (seen.owner_uid == row.owner_uid and str(seen.endpoint) == row.endpoint))
    )
