"""Agents' logs: the last lines, or those after a cursor.

A provider returns the last lines, or a stream of them; `logs -f` asks again and again for the lines after a
cursor.  The first request is answered from the last lines.  With the second one the provider's stream is read
into a bounded buffer (`LogStream`), until it is requested no more.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.backends.log_joiner import LogJoiner
from dispatcher.manager.backends.log_stream import LogStream
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import BadRequest, DispatcherError
from dispatcher.plugin.model import Capability, Handle
from dispatcher.plugin.names import printable

TIMEOUT = 10.0  # seconds for the last lines
RESUME = 0.5  # seconds after which a stream that ended is read again
OVERLAP = 64  # lines by which a resumed stream overlaps the known ones
MAX_SEARCH = 2000  # lines searched for the place of a cursor
FINAL_OUTPUT = 0.4  # seconds that the last output of an app may take to arrive
MAX_LINE = 2000  # characters of a line in a failure
MARK = 8  # lines that mark a place
NO_LINES = "0:0:0:"  # the cursor before the first line

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
