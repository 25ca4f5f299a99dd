"""When an agent that died, or an operation that failed, is tried again: delays and their limit.  Pure.

An agent that was ready and ended is started again at once; the next time within ten minutes after 1, 2, 4, ...
seconds; after `max_restarts` it is failed.  The row's `retry_at` says when; the registry sets a timer for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dispatcher.common import humanize
from dispatcher.config.schema import AppDefaults
from dispatcher.manager.agents.lifecycle import ALIVE, CLEARED, DEAD, Change, EventKind, observed
from dispatcher.manager.storage.rows import AgentRow, Desired, Failure, Kind, Pending
from dispatcher.plugin.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    DispatcherError,
    Forbidden,
    Unavailable,
    Unsupported,
)
from dispatcher.plugin.model import Observation

RESTART_WINDOW = 600.0  # seconds in which automatic starts are counted
MAX_BACKOFF = 60.0  # seconds
UNAVAILABLE_RETRY = 5.0  # seconds before an operation is retried whose backend did not answer
MAX_RETRY = 300.0  # seconds between attempts to stop or remove
LOG_LINES = 20
_NO_MEMORY = ("out of memory", "MemoryError", "Cannot allocate memory", "std::bad_alloc")

_FAILED = {
    Kind.START: "could not be started",
    Kind.MOVE: "could not be moved",
    Kind.SUSPEND: "could not be suspended",
    Kind.HIBERNATE: "could not be hibernated",
    Kind.STOP: "could not be stopped",
    Kind.RESET: "could not be reset",
    Kind.REMOVE: "could not be removed",
}


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
    what = "The app exited unexpectedly"
    failure = Failure(what=what, why=reason, log=tuple(log), time=now, fix=_more_memory(reason, log, policy))
    if retry_at is None:
        failure = dataclasses.replace(
            failure,
            what=f"The app exited unexpectedly {len(attempts) + 1} times within ten minutes"
            if attempts
            else failure.what,
            fix=failure.fix or "read its last lines, then start it again",
        )
        events.append((EventKind.FAILED, f"{failure.what}: {reason}"))
    return {"attempts": attempts, "failure": failure, "retry_at": retry_at}


def _more_memory(reason: str, log: Sequence[str], policy: AppDefaults) -> str:
    """Return what to do about an end for want of memory, which an app often reports itself; "" for another end."""
    limit = policy.limits().memory
    if limit is None or not any(words in text for words in _NO_MEMORY for text in (reason, *log)):
        return ""
    default = "" if policy.memory is not None else ", by default"
    return f"raise `memory` of the app (it is {humanize.size(limit)}{default}), or use less at once"


def is_final(error: DispatcherError) -> bool:
    """Whether a retry cannot succeed without a change."""
    return isinstance(error, (BadRequest, Unsupported, Conflict, Forbidden))


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
        fix=_more_memory(error.why, lines, policy) or error.fix,
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


def recent(attempts: tuple[float, ...], now: float) -> tuple[float, ...]:
    """Return the attempts within the last ten minutes."""
    return tuple(time for time in attempts if now - time < RESTART_WINDOW)


def after_death(attempts: tuple[float, ...], now: float, limit: int) -> tuple[tuple[float, ...], float | None]:
    """Return the counted attempts and when to start an agent again that was ready and ended by itself.

    :return: the time is None when all `limit` restarts within the window are used up.
    """
    counted = recent(attempts, now)
    if len(counted) >= limit:
        return counted, None
    return (*counted, now), now + (backoff(len(counted)) if counted else 0.0)


def after_failure(attempts: tuple[float, ...], now: float, limit: int) -> tuple[tuple[float, ...], float | None]:
    """Return the attempts, this one included, and when to retry an operation that failed; None: give up."""
    counted = (*recent(attempts, now), now)
    return counted, None if len(counted) > limit else now + backoff(len(counted))


def backoff(failures: int) -> float:
    """Return the delay in seconds after so many failures: 1, 2, 4, ... up to a minute."""
    return min(MAX_BACKOFF, 2.0 ** max(0, min(failures, 30) - 1))
