"""Agents' logs: the last lines, or those after a cursor.

A provider returns the last lines, or a stream of them; `logs -f` asks again and again for the lines after a
cursor.  The first request is answered from the last lines.  With the second one the provider's stream is read
into a bounded buffer (`LogStream`), until it is requested no more.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from dispatcher.manager.backends.backend import Backend
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import BadRequest, DispatcherError
from dispatcher.plugin.model import Capability, Handle
from dispatcher.plugin.names import printable

LINGER = 30.0  # seconds without a request after which a stream is no longer read
MAX_BYTES = 4 << 20  # of buffered lines of one stream
TIMEOUT = 10.0  # seconds for the last lines
RESUME = 0.5  # seconds after which a stream that ended is read again
OVERLAP = 64  # lines by which a resumed stream overlaps the known ones
MAX_SEARCH = 2000  # lines searched for the place of a cursor
FINAL_OUTPUT = 0.4  # seconds that the last output of an app may take to arrive
MAX_LINE = 2000  # characters of a line in a failure
MARK = 8  # lines that mark a place
_LINE_OVERHEAD = 64  # bytes that a line costs beside its text
NO_LINES = "0:0:0:"  # the cursor before the first line

_number = itertools.count(1)
_log = logging.getLogger("dispatcher.manager")


class LogCollector:
    """Reads logs on request."""

    def __init__(self) -> None:
        self._streams: dict[str, LogStream] = {}
        self._lock = threading.Lock()

    def lines(
        self, backend: Backend, handle: Handle, *, tail: int, after: str | None, exists: Callable[[], bool]
    ) -> tuple[list[str], str]:
        """Return lines and the next cursor.

        :param exists: whether the agent still exists: its log is not read beyond its removal.
        :raises BadRequest: the cursor is invalid.
        :raises DispatcherError: as the provider's `logs`.
        """
        if after is None:
            lines = self._last(backend, handle, max(tail, MARK))
            return lines[len(lines) - tail :] if tail < len(lines) else lines, _cursor("0", 0, lines)
        return self._follow(backend, handle, after, exists)

    def close(self) -> None:
        """End all streams."""
        with self._lock:
            for stream in self._streams.values():
                stream.deadline.at = 0.0

    def _last(self, backend: Backend, handle: Handle, tail: int) -> list[str]:
        def read() -> list[str]:
            lines = backend.provider.logs(handle, tail=tail, follow=False, deadline=Deadline(TIMEOUT))
            return list(deque(map(_text, lines), maxlen=tail))

        return backend.call(read, TIMEOUT + 1)

    def _follow(
        self, backend: Backend, handle: Handle, after: str, exists: Callable[[], bool]
    ) -> tuple[list[str], str]:
        source, number, count, digest = _parse(after)
        with self._lock:
            stream = self._streams.get(handle.agent)
            begin = stream is None or stream.ended
            if stream is None or stream.ended:
                stream = self._streams[handle.agent] = LogStream(self._last(backend, handle, MAX_SEARCH))
        stream.extend()
        if begin:
            backend.pool.submit(lambda: self._read(backend, handle, stream, exists), urgent=False)
        if source != stream.id:
            known, end = stream.since(0)
            lines = known[_place(known, count, digest) :]
        else:
            lines, end = stream.since(number)
        return lines, _cursor(stream.id, end, stream.last(MARK))

    def _read(self, backend: Backend, handle: Handle, stream: LogStream, exists: Callable[[], bool]) -> None:
        try:
            with backend.pool.released():
                while not stream.deadline.expired and exists():
                    joiner = LogJoiner(stream.last(OVERLAP))
                    lines = backend.provider.logs(handle, tail=OVERLAP, follow=True, deadline=stream.deadline)
                    for line in lines:
                        for text in joiner.new(_text(line)):
                            stream.add(text)
                    time.sleep(RESUME)
        except DispatcherError as error:
            _log.debug("A log is no longer followed: %s", error)
        finally:
            stream.ended = True
            with self._lock:
                if self._streams.get(handle.agent) is stream:
                    del self._streams[handle.agent]


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def _cursor(source: str, number: int, lines: list[str]) -> str:
    last = lines[-MARK:]
    return f"{source}:{number}:{len(last)}:{_digest(last)}"


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()[:16] if lines else ""


def _parse(cursor: str) -> tuple[str, int, int, str]:
    try:
        source, number, count, digest = cursor.split(":")
        return source, int(number), min(MARK, int(count)), digest
    except ValueError:
        raise BadRequest("Invalid cursor", why="it is not from an earlier response", fix="leave it out") from None


def _place(lines: list[str], count: int, digest: str) -> int:
    """Return the index after the marked lines, 0 if they are not there (then all lines are new)."""
    for end in range(len(lines), count - 1, -1):
        if count and _digest(lines[end - count : end]) == digest:
            return end
    return 0


def last_lines(backend: Backend, handle: Handle | None, count: int) -> list[str]:
    """Return an agent's last lines of output, none if they cannot be read.

    The last output of an app that has just ended may still be on its way: an empty log is read again for a moment.
    """
    if handle is None or Capability.LOGS not in backend.capabilities:
        return []
    patience = Deadline(FINAL_OUTPUT)
    while not (lines := _read_last(backend, handle, count)) and not patience.expired:
        time.sleep(0.05)
    return lines


def _read_last(backend: Backend, handle: Handle, count: int) -> list[str]:
    lines: list[str] = []
    try:
        for line in backend.provider.logs(handle, tail=count, follow=False, deadline=Deadline(3)):
            lines.append(_text(line)[:MAX_LINE])
            if len(lines) >= count:
                break
    except DispatcherError as error:
        _log.debug("%s: no log: %s", printable(handle.agent), error)
    return lines


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


class LogJoiner:
    """Joins a stream that begins with some of the last lines to the known ones, without loss or duplicates.

    :param known: the newest last; the stream may begin anywhere in it.
    """

    def __init__(self, known: list[str]) -> None:
        self._known = known
        self._places = list(range(len(known) + 1))  # where in `known` the next line may be
        self._held: list[str] = []
        self._joined = not known

    def new(self, line: str) -> list[str]:
        """Take a line of the stream; return the lines that turn out to be new."""
        if self._joined:
            return [line]
        known = self._known
        following = [place + 1 for place in self._places if place < len(known) and known[place] == line]
        if following and len(self._held) < len(known):
            self._places = following
            self._held.append(line)
            return []
        self._joined = True
        # Either all held lines are the end of what is known, or the stream began after it.
        return [line] if len(known) in self._places else [*self._held, line]
