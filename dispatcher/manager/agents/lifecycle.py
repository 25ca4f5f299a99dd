"""The state machine of an agent.  Pure: no I/O, no clock, no thread.

From what is wanted (`Desired`), what the backend said last, and what is being done, three functions say what
to do next (`next_operation`), what people see (`public_state`) and what the edge is told (`feed_state`); a
fourth, `superseded`, says whether what is being done is still wanted.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from dispatcher.plugin.model import BackendState

RESTART_WINDOW = 600.0  # seconds in which automatic starts are counted
LONGEST_BACKOFF = 60.0  # seconds

FeedState = Literal["running", "asleep", "starting", "stopping", "failed"]


class Desired(str, enum.Enum):
    """What is wanted of an agent; written before anything is done about it."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPED = "stopped"
    ABSENT = "absent"


class Pending(str, enum.Enum):
    """Something to be done once, on the way to what is desired."""

    NONE = ""
    RESTART = "restart"
    RESET = "reset"


class Kind(str, enum.Enum):
    """An operation on an agent; one at a time."""

    START = "start"  # also resumes
    SUSPEND = "suspend"
    HIBERNATE = "hibernate"
    STOP = "stop"
    RESET = "reset"
    MOVE = "move"
    REMOVE = "remove"


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


ASLEEP = frozenset({BackendState.SUSPENDED, BackendState.HIBERNATED})
DEAD = frozenset({BackendState.STOPPED, BackendState.ABSENT})
ALIVE = frozenset(BackendState) - DEAD
_DOING = {
    Kind.START: State.STARTING,
    Kind.MOVE: State.STARTING,
    Kind.SUSPEND: State.SUSPENDING,
    Kind.HIBERNATE: State.SUSPENDING,
    Kind.STOP: State.STOPPING,
    Kind.RESET: State.STOPPING,
    Kind.REMOVE: State.REMOVING,
}
_SETTLED = {BackendState.SUSPENDED: State.SUSPENDED, BackendState.HIBERNATED: State.HIBERNATED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that decides about an agent.

    :ivar observed: what the backend said last; :ivar ready: the health check answered since it runs.
    :ivar reachable: the backend answers; :ivar operation: what is being done now.
    :ivar moving: its app's provider is not the one that has the agent and its data.
    :ivar failed: the last try to reach what is desired failed; :ivar held: nothing is to be begun now (back-off,
        given up, or a provider's call hangs).
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
        """What is to be done before anything else; a restart only matters while the agent shall run."""
        if self.pending is Pending.RESTART and self.desired is not Desired.RUNNING:
            return Pending.NONE
        return self.pending


def reached(now: Situation) -> bool:
    """Whether the agent is as desired.  One that shall sleep and has ended has nothing left to put to sleep."""
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
    """Return what to do next, None for nothing (or nothing yet)."""
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
    """Whether an operation in flight contradicts a newer intent and should be cancelled.

    Stops, resets and removals are never cancelled: what follows begins when they are done.
    """
    if operation in {Kind.START, Kind.MOVE}:
        return desired in {Desired.STOPPED, Desired.ABSENT} or pending is not Pending.NONE
    if operation in {Kind.SUSPEND, Kind.HIBERNATE}:
        return desired not in {Desired.SUSPENDED, Desired.HIBERNATED} or pending is not Pending.NONE
    return False


def public_state(now: Situation) -> State:
    """Return what people see.

    While a backend cannot be asked, an agent that did not rest is *unknown*, never *stopped*.
    """
    if now.operation is not None:
        return _DOING[now.operation]
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
    return _SETTLED.get(now.observed, State.STARTING)


def feed_state(now: Situation) -> FeedState:
    """Return what the edge is told: where a request may go.

    An agent whose backend cannot be asked, or that could not be put to sleep, goes on being served.
    """
    if now.operation is not None:
        return "starting" if now.operation in {Kind.START, Kind.MOVE} else "stopping"
    if now.desired is Desired.ABSENT or now.first is not Pending.NONE:
        return "stopping"
    if now.observed is BackendState.RUNNING and now.ready and now.desired is not Desired.STOPPED:
        return "running"
    if now.failed:
        return "failed"
    if now.desired is Desired.RUNNING:
        return "starting"
    return "asleep" if now.observed in ASLEEP | DEAD else "stopping"


def recent(attempts: tuple[float, ...], now: float) -> tuple[float, ...]:
    """Return the attempts that still count."""
    return tuple(time for time in attempts if now - time < RESTART_WINDOW)


def after_death(attempts: tuple[float, ...], now: float, most: int) -> tuple[tuple[float, ...], float | None]:
    """Return the attempts and when to start an agent again that was ready and ended by itself.

    The first time at once, then after 1, 2, 4, ... seconds; None when it has used up `most` within the window.
    """
    counted = recent(attempts, now)
    if len(counted) >= most:
        return counted, None
    return (*counted, now), now + (backoff(len(counted)) if counted else 0.0)


def after_failure(attempts: tuple[float, ...], now: float, most: int) -> tuple[tuple[float, ...], float | None]:
    """Return the attempts, this one counted, and when to try again what failed; None: give up."""
    counted = (*recent(attempts, now), now)
    return counted, None if len(counted) > most else now + backoff(len(counted))


def backoff(failures: int) -> float:
    """Return seconds to wait after so many failures: 1, 2, 4, ... up to a minute."""
    return min(LONGEST_BACKOFF, 2.0 ** max(0, min(failures, 30) - 1))
