"""The lines of one agent that is being followed, in a bounded buffer."""

from __future__ import annotations

import itertools
import threading
from collections import deque

from dispatcher.plugin.deadline import Deadline, boottime

LINGER = 30.0  # seconds without a request after which a stream is no longer read
MAX_BYTES = 4 << 20  # of buffered lines
_LINE_OVERHEAD = 64  # bytes that a line costs beside its text

_number = itertools.count(1)


class LogStream:
    """Numbered lines, read from a provider's log.

    :ivar deadline: of the stream; moves on with every request; :ivar ended: it is no longer read.
    """

    def __init__(self, lines: list[str], max_bytes: int = MAX_BYTES) -> None:
        self.id = str(next(_number))
        self.deadline = Deadline(LINGER)
        self.ended = False
        self._max_bytes = max_bytes
        self._lines: deque[str] = deque()
        self._first = 0  # number of the oldest buffered line
        self._size = 0
        self._lock = threading.Lock()
        for line in lines:
            self.add(line)

    def add(self, line: str) -> None:
        """Append a line; the oldest lines go when there are too many."""
        with self._lock:
            self._lines.append(line)
            self._size += len(line) + _LINE_OVERHEAD
            while self._size > self._max_bytes:
                self._size -= len(self._lines.popleft()) + _LINE_OVERHEAD
                self._first += 1

    def extend(self) -> None:
        """Keep the stream for a while: it was requested just now."""
        self.deadline.at = boottime() + LINGER

    def since(self, number: int) -> tuple[list[str], int]:
        """Return the lines from a number on, and the number of the next one to come."""
        with self._lock:
            skipped = max(0, number - self._first)
            return list(itertools.islice(self._lines, skipped, None)), self._first + len(self._lines)

    def last(self, count: int) -> list[str]:
        """Return the last lines."""
        with self._lock:
            return list(itertools.islice(self._lines, max(0, len(self._lines) - count), None))
