"""When an agent or an operation is tried again after a death or a failure: delays and their limit.  Pure."""

from __future__ import annotations

RESTART_WINDOW = 600.0  # seconds in which automatic starts are counted
MAX_BACKOFF = 60.0  # seconds


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
