"""How an observation, a failure or a death changes an agent's row.  Pure.

An agent that was ready and ended is started again at once; the next time within ten minutes after 1, 2, 4, ...
seconds; after `max_restarts` it is failed.  The row's `retry_at` says when; the engine sets a timer for it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dispatcher.config.schema import AppDefaults
from dispatcher.manager.agents.lifecycle import ALIVE, DEAD
from dispatcher.manager.agents.restarts import after_death, after_failure, backoff, recent
from dispatcher.manager.storage.rows import AgentRow, Failure
from dispatcher.manager.storage.states import Desired, Kind, Pending
from dispatcher.plugin.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    DispatcherError,
    Unavailable,
    Unsupported,
)
from dispatcher.plugin.model import BackendState, Observation

SAME_START = 2.0  # seconds by which two reports of one start may differ
UNAVAILABLE_RETRY = 5.0  # seconds before an operation is retried whose backend did not answer
MAX_RETRY = 300.0  # seconds between attempts to stop or remove
LOG_LINES = 20

_FAILED = {
    Kind.START: "could not be started",
    Kind.MOVE: "could not be moved",
    Kind.SUSPEND: "could not be suspended",
    Kind.HIBERNATE: "could not be hibernated",
    Kind.STOP: "could not be stopped",
    Kind.RESET: "could not be reset",
    Kind.REMOVE: "could not be removed",
}

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


def died(row: AgentRow, seen: Observation) -> bool:
    """Whether an observation shows that an agent has ended whose desired state is running."""
    return (
        row.observed in ALIVE
        and seen.state in DEAD
        and row.desired is Desired.RUNNING
        and row.pending is Pending.NONE
    )


def noticed(
    row: AgentRow, seen: Observation, *, now: float, policy: AppDefaults, log: Sequence[str], host_restarted: bool
) -> Change | None:
    """Return the change that follows from an observation outside of operations, None for no news."""
    fields = observed(row, seen, now)
    events: list[tuple[EventKind, str]] = []
    if died(row, seen):
        reason = "the host was restarted" if host_restarted else seen.exit_reason or "reason unknown"
        events.append((EventKind.DIED, reason))
        if not host_restarted:
            fields |= _after_death(row, reason, now, policy, log, events)
    elif row.observed in ALIVE and seen.state in DEAD:
        events.append((EventKind.STOPPED, seen.exit_reason or "it no longer exists on the backend"))
    if not events and all(getattr(row, name) == value for name, value in fields.items()):
        return None
    return Change(fields, events)


def _after_death(
    row: AgentRow,
    reason: str,
    now: float,
    policy: AppDefaults,
    log: Sequence[str],
    events: list[tuple[EventKind, str]],
) -> dict[str, Any]:
    attempts, retry_at = after_death(row.attempts, now, policy.max_restarts)
    if retry_at == now:
        return {"attempts": attempts, **CLEARED}
    failure = Failure(what="The app exited unexpectedly", why=reason, log=tuple(log), time=now)
    if retry_at is None:
        failure = dataclasses.replace(
            failure,
            what=f"The app exited unexpectedly {len(attempts) + 1} times within ten minutes"
            if attempts
            else failure.what,
            fix="read its last lines, then start it again",
        )
        events.append((EventKind.FAILED, f"{failure.what}: {reason}"))
    return {"attempts": attempts, "failure": failure, "retry_at": retry_at}


def is_final(error: DispatcherError) -> bool:
    """Whether a retry cannot succeed without a change."""
    return isinstance(error, (BadRequest, Unsupported, Conflict))


def is_backend_away(error: DispatcherError) -> bool:
    """Whether an error means that the backend (or the database) does not answer, and says nothing of the agent."""
    return isinstance(error, Unavailable) and not isinstance(error, DeadlineExceeded)


def failed(
    row: AgentRow,
    kind: Kind,
    error: DispatcherError,
    *,
    seen: Observation | None,
    now: float,
    policy: AppDefaults,
    log: Sequence[str],
) -> Change:
    """Return the change after a failed operation: the reason, and when it is retried.

    :param seen: the agent observed afterwards; None when the backend did not answer.
    """
    fields = observed(row, seen, now) if seen else {}
    lines = error.details.get("log") or log
    failure = Failure(
        what=error.what,
        why=error.why,
        fix=error.fix,
        log=tuple(str(line) for line in lines)[-LOG_LINES:],
        time=now,
        final=is_final(error),
    )
    attempts = row.attempts
    retry_at: float | None
    if is_backend_away(error):
        retry_at = now + UNAVAILABLE_RETRY
    elif kind in {Kind.STOP, Kind.RESET, Kind.REMOVE}:
        attempts = (*recent(attempts, now), now)
        retry_at = now + min(MAX_RETRY, 5 * backoff(len(attempts)))
    else:
        attempts, retry_at = after_failure(attempts, now, policy.max_restarts)
        if failure.final:
            retry_at = None
    fields |= {"failure": failure, "attempts": attempts, "retry_at": retry_at}
    return Change(fields, [(EventKind.FAILED, f"It {_FAILED[kind]}: {error}")])
