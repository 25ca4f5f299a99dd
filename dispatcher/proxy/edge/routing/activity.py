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


class PollDetector:
    """Recognises requests to one agent that a script makes, not a person."""

    def __init__(self) -> None:
        # Target -> [time of the last request, longest pause so far].  The oldest entry goes first.
        self._seen: dict[bytes, list[float]] = {}
        # The same for unsafe methods: [time of the last request, last pause, how many pauses were like it].
        self._changes: dict[bytes, list[float]] = {}

    def is_poll(self, request: Request, now: float) -> bool:
        """Whether a script made the request rather than a person; the request is recorded.

        A navigation is by a person, and so is an unsafe method, unless a page's script sends it on a timer: an
        open JupyterLab saves its layout every ten seconds.  The third GET of the same target, after a pause that
        is not much longer than those before, is a poll; the same holds for a WebSocket that is opened repeatedly.
        Numbers in a query that only defeat caches do not make a new target.
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
        return longest >= 0.0 and pause <= max(longest, 1.0) * _SLACK

    def _by_timer(self, request: Request, now: float) -> bool:
        """Whether a page's script sends this change at regular intervals.  A program's changes are always use."""
        mode = request.fields.get(field_names.SEC_FETCH_MODE)
        if mode is None or mode == b"navigate":
            return False
        path = request.method + b" " + request.target.partition(b"?")[0]
        entry = self._changes.get(path)
        if entry is None:
            if len(self._changes) >= _MAX_TARGETS:
                del self._changes[next(iter(self._changes))]
            self._changes[path] = [now, 0.0, 0.0]
            return False
        pause = now - entry[0]
        equal = pause >= 1.0 and abs(pause - entry[1]) <= _STEADY * pause
        entry[:] = [now, pause, entry[2] + 1.0 if equal else 0.0]
        return entry[2] >= _EQUAL_PAUSES - 1
