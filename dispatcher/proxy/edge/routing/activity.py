"""Distinguishes use from polling: requests and bytes in, counters of docs/reference/feed.md out.

Use means that a person acts: reads, clicks and types.  A tab that was left open polls, pings and reconnects, which
is not use.  The hot path pays one dictionary lookup and a few comparisons.
"""

from __future__ import annotations

import re
from typing import Final

from dispatcher.proxy.edge.http import field_names
from dispatcher.proxy.edge.http.request import SAFE, SILENT, Request

TRICKLE: Final = 1024.0  # bytes per second up to which a flow is not use
_MAX_TARGETS: Final = 128  # remembered for each agent
_SLACK: Final = 4.0  # a repetition up to that factor beyond the longest pause is still a poll: scripts back off
_STEADY: Final = 0.2  # pauses that differ by less than this share of them count as equal
_EQUAL_PAUSES: Final = 3  # so many equal pauses are a timer's
_SELDOM: Final = 600.0  # seconds of pause from which on a program's repetition is use: a cron job's
_NUMBERS: Final = re.compile(rb"[0-9]{5,}|[0-9a-fA-F]{16,}")


class Traffic:
    """Counters of one agent since the last report."""

    def __init__(self) -> None:
        self.use = 0
        self.poll = 0
        self.stream = 0  # bytes that are use by themselves: WebSocket data from the client
        self.bulk = 0  # bytes that are use when there are more than a trickle of them
        self.bytes_in = 0
        self.bytes_out = 0

    def report(self, seconds: float, idle_sockets: int) -> dict[str, int] | None:
        """Return the agent's entry in the feed's activity frame, None without activity; reset the counters."""
        if not (self.bytes_in or self.bytes_out or self.use or self.poll or self.stream or idle_sockets):
            return None  # most agents, most of the time
        stream = self.stream + (self.bulk if self.bulk > TRICKLE * max(seconds, 1.0) else 0)
        values = {
            "use": self.use,
            "stream": stream,
            "in": self.bytes_in,
            "out": self.bytes_out,
            "poll": self.poll,
            "idle_sockets": idle_sockets,
        }
        self.use = self.poll = self.stream = self.bulk = self.bytes_in = self.bytes_out = 0
        return {name: value for name, value in values.items() if value} or None


class Intervals:
    """The pauses between events of one kind."""

    def __init__(self, now: float) -> None:
        self._last = now
        self._pause = 0.0
        self._equal = 0

    def by_timer(self, now: float) -> bool:
        """Add an event; return whether the last pauses were equal, as a timer's are and a person's are not."""
        pause = now - self._last
        equal = pause >= 1.0 and abs(pause - self._pause) <= _STEADY * pause
        self._last, self._pause, self._equal = now, pause, self._equal + 1 if equal else 0
        return self._equal >= _EQUAL_PAUSES - 1


class Timers:
    """Recognises a timer's events among others of many kinds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kinds: dict[bytes | int, Intervals] = {}  # the oldest first

    def by_timer(self, kind: bytes | int, now: float) -> bool:
        """Add an event; see `Intervals.by_timer`."""
        intervals = self._kinds.get(kind)
        if intervals is None:
            if len(self._kinds) >= self._most:
                del self._kinds[next(iter(self._kinds))]
            self._kinds[kind] = Intervals(now)
            return False
        return intervals.by_timer(now)


class PollDetector:
    """Recognises requests to one agent that a script makes, not a person."""

    def __init__(self) -> None:
        # Target -> [time of the last request, longest pause so far].  The oldest entry goes first.
        self._seen: dict[bytes, list[float]] = {}
        self._changes = Timers(_MAX_TARGETS)

    def is_poll(self, request: Request, now: float) -> bool:
        """Whether a script made the request rather than a person; the request is recorded.

        A navigation is by a person, and so is an unsafe method, unless a page's script sends it on a timer: an
        open JupyterLab saves its layout every ten seconds.  The third GET of the same target, after a pause that
        is not much longer than those before, is a poll; the same holds for a WebSocket that is opened repeatedly.
        Numbers in a query that only defeat caches do not make a new target.  A program that comes seldom, such as
        a cron job, does not poll.
        """
        traits = request.traits
        if not traits & SAFE:
            return self._by_timer(request, now)
        if request.by_hand:
            return False
        if request.machine or traits & SILENT:
            return True
        target = request.target
        entry = self._seen.get(target)
        if entry is None:
            mark = target.find(b"?")
            if mark >= 0:
                target = target[:mark] + (b"" if request.upgrade else _NUMBERS.sub(b"0", target[mark:]))
                entry = self._seen.get(target)
            if entry is None:
                if len(self._seen) >= _MAX_TARGETS:
                    del self._seen[next(iter(self._seen))]
                self._seen[target] = [now, -1.0]
                return False
        pause = now - entry[0]
        entry[0] = now
        longest = entry[1]
        if pause > longest:
            entry[1] = pause
        if longest < 0.0 or pause > max(longest, 1.0) * _SLACK:
            return False
        return pause < _SELDOM or not _by_program(request)

    def _by_timer(self, request: Request, now: float) -> bool:
        """Whether a page's script sends this change at regular intervals.  A program's changes are always use."""
        mode = request.fields.get(field_names.SEC_FETCH_MODE)
        if mode == b"navigate" or (mode is None and (_by_program(request) or request.looks_like_page())):
            return False
        return self._changes.by_timer(request.method + b" " + request.target.partition(b"?")[0], now)


def _by_program(request: Request) -> bool:
    """Whether no browser sent it: over plain HTTP a page's script sends at least one of these."""
    fields = request.fields
    return not (
        field_names.SEC_FETCH_MODE in fields
        or field_names.ORIGIN in fields
        or b"\r\nreferer:" in b"\r\n" + request.lines.lower()
    )
