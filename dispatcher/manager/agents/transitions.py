"""What an observation, a failure or a death means for an agent's row.  Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dispatcher.config.load import AppDefaults
from dispatcher.manager.agents.lifecycle import (
    ALIVE,
    DEAD,
    Desired,
    Kind,
    Pending,
    after_death,
    after_failure,
    backoff,
    recent,
)
from dispatcher.manager.agents.registry import Change
from dispatcher.manager.storage.agents import AgentRow, Failure
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
ASK_AGAIN = 5.0  # seconds after which an operation is tried again whose backend could not be asked
LONGEST_RETRY = 300.0  # seconds between tries to stop or remove
LOG_LINES = 20

_DOING = {
    Kind.START: "could not be started",
    Kind.MOVE: "could not be moved",
    Kind.SUSPEND: "could not be suspended",
    Kind.HIBERNATE: "could not be hibernated",
    Kind.STOP: "could not be stopped",
    Kind.RESET: "could not be reset",
    Kind.REMOVE: "could not be removed",
}


def observed(row: AgentRow, seen: Observation, now: float) -> dict[str, Any]:
    """Return the fields of a row that an observation changes.

    Ready stays an agent that was ready and has run on since; whoever started anew has to prove it again.
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
            # A list need not know: what slept, or was away, began when it did.
            fields["started_at"] = row.started_at if seen.started_at is None else seen.started_at
    if any(getattr(row, name) != value for name, value in fields.items()):
        fields["observed_at"] = now
    return fields


def same(row: AgentRow, seen: Observation) -> bool:
    """Whether an observation plainly says nothing new: the cheap answer for most agents of a sweep."""
    if seen.state is not row.observed:
        return False
    return seen.state in DEAD or (
        seen.spec_hash in {"", row.spec_hash}
        and (row.started_at == seen.started_at or seen.started_at is None)
        and (seen.endpoint is None or (seen.owner_uid == row.owner_uid and str(seen.endpoint) == row.endpoint))
    )


def died(row: AgentRow, seen: Observation) -> bool:
    """Whether an observation says that an agent that should run has ended."""
    return (
        row.observed in ALIVE
        and seen.state in DEAD
        and row.desired is Desired.RUNNING
        and row.pending is Pending.NONE
    )


def noticed(
    row: AgentRow, seen: Observation, *, now: float, policy: AppDefaults, log: Sequence[str], host_restarted: bool
) -> Change | None:
    """Return what an observation outside of operations changes, None when it says nothing new."""
    fields = observed(row, seen, now)
    events: list[tuple[str, str]] = []
    if died(row, seen):
        reason = "the host was restarted" if host_restarted else seen.exit_reason or "nobody knows why"
        events.append(("died", reason))
        if not host_restarted:
            fields |= _after_death(row, reason, now, policy, log, events)
    elif row.observed in ALIVE and seen.state in DEAD:
        events.append(("stopped", seen.exit_reason or "it is no longer there"))
    if not events and all(getattr(row, name) == value for name, value in fields.items()):
        return None
    return Change(fields, events)


def _after_death(
    row: AgentRow,
    reason: str,
    now: float,
    policy: AppDefaults,
    log: Sequence[str],
    events: list[tuple[str, str]],
) -> dict[str, Any]:
    attempts, retry_at = after_death(row.attempts, now, policy.max_restarts)
    if retry_at == now:
        return {"attempts": attempts, "failure": None, "retry_at": None}
    failure = Failure(what="The app ended by itself", why=reason, log=tuple(log), time=now)
    if retry_at is None:
        failure = dataclasses.replace(
            failure,
            what=f"The app ended by itself {len(attempts) + 1} times within ten minutes"
            if attempts
            else failure.what,
            fix="see its last lines, then start it again",
        )
        events.append(("failed", f"{failure.what}: {reason}"))
    return {"attempts": attempts, "failure": failure, "retry_at": retry_at}


def is_final(error: DispatcherError) -> bool:
    """Whether trying again cannot help until somebody changes something."""
    return isinstance(error, (BadRequest, Unsupported, Conflict))


def is_backend_away(error: DispatcherError) -> bool:
    """Whether an error says that the backend (or the database) cannot be asked, and nothing of the agent."""
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
    """Return what a failed operation changes: the reason, and when it is tried again.

    :param seen: how the agent was found afterwards; None when that could not be asked.
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
        retry_at = now + ASK_AGAIN
    elif kind in {Kind.STOP, Kind.RESET, Kind.REMOVE}:
        attempts = (*recent(attempts, now), now)
        retry_at = now + min(LONGEST_RETRY, 5 * backoff(len(attempts)))
    else:
        attempts, retry_at = after_failure(attempts, now, policy.max_restarts)
        if failure.final:
            retry_at = None
    fields |= {"failure": failure, "attempts": attempts, "retry_at": retry_at}
    return Change(fields, [("failed", f"It {_DOING[kind]}: {error}")])
