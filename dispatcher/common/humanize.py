"""Sizes, durations and times as text for people.  Pure."""

from __future__ import annotations

import math
import time

_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
_NOW = 5.0  # seconds; what happened since then happened "just now"


def size(count: float | None) -> str:
    """Return a number of bytes: ``512 B``, ``34.5 MiB``, ...; ``-`` for None."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def share(used: int | None, limit: int | None) -> str:
    """Return what is used of a limit: ``1.2 GiB of 5.0 GiB``, ``1.2 GiB`` without one; "" if unknown."""
    if used is None:
        return ""
    return size(used) if limit is None else f"{size(used)} of {size(limit)}"


def duration(seconds: float, *, up: bool = False) -> str:
    """Return a duration in one unit: ``3 minutes``; ``a moment`` below a second.

    :param up: round up, at least to a second, for a time to wait; otherwise round down.
    """
    for unit, length in _UNITS:
        if seconds >= length:
            count = math.ceil(seconds / length) if up else int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "1 second" if up else "a moment"


def short_duration(seconds: float | None) -> str:
    """Return a duration for a table: ``0.4s``, ``59s``, ``2m 5s``, ``3h 20m``, ``4d 1h``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    parts: list[str] = []
    rest = int(seconds)
    for unit, length in _UNITS:
        count, rest = divmod(rest, length)
        if parts or count:
            parts.append(f"{count}{unit[0]}" if count else "")
    return " ".join(filter(None, parts[:2]))


def ago(when: str | None, *, never: str = "never", now: float | None = None) -> str:
    """Return an ISO 8601 time relative to now: ``3 minutes ago``, ``in 2 days``, ``just now``.

    :param when: UTC where it names no zone; None becomes `never`, an invalid one ``some time ago``.
    :param now: Unix time.
    """
    from datetime import datetime, timezone  # slow to import, and the command line starts with this module

    if not when:
        return never
    try:
        then = datetime.fromisoformat(when.replace("Z", "+00:00"))
    except (ValueError, AttributeError):
        return "some time ago"
    if then.tzinfo is None:
        then = then.replace(tzinfo=timezone.utc)
    seconds = (time.time() if now is None else now) - then.timestamp()
    if seconds < -1:
        return f"in {duration(-seconds)}"
    return "just now" if seconds < _NOW else f"{duration(seconds)} ago"
