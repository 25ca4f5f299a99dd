"""Following an agent's output with cursors.  Asks providers for logs, in their pools' threads.

A provider gives the last lines, or a stream of them; `logs -f` asks again and again for what came after a
cursor.  The first question is answered from the last lines.  With the second one a follower reads the stream
into a bounded buffer, where every line has a number; it ends when nobody asks any more.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections import deque

from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.registry import Engine
from dispatcher.manager.backends.backend import Backend
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import BadRequest, DispatcherError
from dispatcher.plugin.model import Handle

ANSWER = 10.0  # seconds for the last lines
AGAIN = 0.5  # seconds after which a stream that ended is taken up again
FORGET = 30.0  # seconds without a question after which a follower ends
OVERLAP = 64  # lines by which a stream that is taken up overlaps what is known
HELD = 4 << 20  # bytes of lines in one follower
MOST = 2000  # lines that are looked through for the place of a cursor
MARK = 8  # lines that mark a place

_log = logging.getLogger("dispatcher.manager")
_number = itertools.count(1)


class Follower:
    """The lines of one agent, numbered, from a stream that is being read.

    :ivar deadline: of the stream; moves on with every question.
    """

    def __init__(self, lines: list[str]) -> None:
        self.id = str(next(_number))
        self.deadline = Deadline(FORGET)
        self.ended = False
        self._lines: deque[str] = deque()
        self._first = 0  # number of the oldest line that is still held
        self._size = 0
        self._lock = threading.Lock()
        for line in lines:
            self.add(line)

    def add(self, line: str) -> None:
        """Take one more line, and let the oldest go when there are too many."""
        with self._lock:
            self._lines.append(line)
            self._size += len(line) + 64
            while self._size > HELD:
                self._size -= len(self._lines.popleft()) + 64
                self._first += 1

    def asked(self) -> None:
        """Go on for a while."""
        self.deadline.at = boottime() + FORGET

    def since(self, number: int) -> tuple[list[str], int]:
        """Return the lines from a number on, and the number of the next one to come."""
        with self._lock:
            skipped = max(0, number - self._first)
            return list(itertools.islice(self._lines, skipped, None)), self._first + len(self._lines)

    def last(self, count: int) -> list[str]:
        """Return the last lines."""
        with self._lock:
            return list(itertools.islice(self._lines, max(0, len(self._lines) - count), None))


class Seam:
    """Joins a stream that begins with some last lines to lines that are known already.

    :param known: what is known, the newest last; the stream may begin anywhere in it.
    """

    def __init__(self, known: list[str]) -> None:
        self._known = known
        self._places = list(range(len(known) + 1))  # where in `known` the next line may be
        self._held: list[str] = []
        self._open = bool(known)

    def new(self, line: str) -> list[str]:
        """Take a line of the stream; return which lines turn out to be new."""
        if not self._open:
            return [line]
        known = self._known
        following = [place + 1 for place in self._places if place < len(known) and known[place] == line]
        if following and len(self._held) < len(known):
            self._places = following
            self._held.append(line)
            return []
        self._open = False
        # Either all held lines are the end of what is known, or the stream began after it.
        return [line] if len(known) in self._places else [*self._held, line]


class Tails:
    """Answers questions for output."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._followers: dict[str, Follower] = {}
        self._lock = threading.Lock()

    def lines(self, agent: Agent, *, tail: int, after: str | None) -> tuple[list[str], str]:
        """Return lines and the next cursor.

        :raises BadRequest: the cursor is none.
        :raises DispatcherError: as the provider's `logs`.
        """
        handle = agent.handle
        if handle is None:
            return [], "0:0:0:"
        backend = self._engine.backends.get(agent.row.provider)
        if after is None:
            lines = self._last(backend, handle, max(tail, MARK))
            return lines[len(lines) - tail :] if tail < len(lines) else lines, _cursor("0", 0, lines)
        return self._follow(agent, backend, handle, after)

    def close(self) -> None:
        """Follow nothing any more."""
        with self._lock:
            for follower in self._followers.values():
                follower.deadline.at = 0.0

    def _last(self, backend: Backend, handle: Handle, tail: int) -> list[str]:
        def read() -> list[str]:
            found: deque[str] = deque(maxlen=tail)
            for line in backend.guard.logs(handle, tail=tail, follow=False, deadline=Deadline(ANSWER)):
                found.append(_text(line))
            return list(found)

        return backend.ask(read, ANSWER + 1)

    def _follow(self, agent: Agent, backend: Backend, handle: Handle, after: str) -> tuple[list[str], str]:
        source, number, count, digest = _parse(after)
        with self._lock:
            follower = self._followers.get(agent.row.name)
            fresh = follower is None or follower.ended
            if follower is None or follower.ended:
                follower = self._followers[agent.row.name] = Follower(self._last(backend, handle, MOST))
        follower.asked()
        if fresh:
            self._begin(agent, backend, handle, follower)
        if source != follower.id:
            held, end = follower.since(0)
            lines = held[_place(held, count, digest) :]
        else:
            lines, end = follower.since(number)
        return lines, _cursor(follower.id, end, follower.last(MARK))

    def _begin(self, agent: Agent, backend: Backend, handle: Handle, follower: Follower) -> None:
        def run() -> None:
            try:
                with backend.pool.released():
                    while not follower.deadline.expired and not agent.gone:
                        seam = Seam(follower.last(OVERLAP))
                        for line in backend.guard.logs(
                            handle, tail=OVERLAP, follow=True, deadline=follower.deadline
                        ):
                            for text in seam.new(_text(line)):
                                follower.add(text)
                        time.sleep(AGAIN)
            except DispatcherError as error:
                _log.debug("A log is no longer followed: %s", error)
            finally:
                follower.ended = True
                with self._lock:
                    if self._followers.get(agent.row.name) is follower:
                        del self._followers[agent.row.name]

        backend.pool.submit(run, urgent=False)


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
        raise BadRequest("Bad cursor", why="it is none that an earlier answer gave", fix="leave it out") from None


def _place(lines: list[str], count: int, digest: str) -> int:
    """Return the index after the marked lines, 0 when they are not there (then nothing was seen of these)."""
    for end in range(len(lines), count - 1, -1):
        if count and _digest(lines[end - count : end]) == digest:
            return end
    return 0
