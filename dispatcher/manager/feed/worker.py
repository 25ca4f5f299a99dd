"""One edge worker's connection, seen from the manager.  Touches its transport; lives in the feed's loop."""

from __future__ import annotations

import asyncio
from typing import Any

from dispatcher.common.log import logger

MAX_BEHIND = 32 * 1024 * 1024  # bytes that a worker may be behind before it is dropped

_log = logger("manager.feed")


class Worker:
    """Frames go out in order: while the snapshot is under way, changes wait behind it."""

    def __init__(self, writer: asyncio.StreamWriter, task: asyncio.Task[Any] | None) -> None:
        self.pid = 0
        self.answers = False  # it says when it has applied what was sent (`feed_sync`)
        self.late = False  # it has not done so in time
        self.counters: dict[str, float] = {}
        self.task = task
        self._writer = writer
        self._held: list[bytes] | None = []
        self._held_bytes = 0

    def send(self, frame: bytes, *, at_once: bool = False) -> None:
        """Send a frame, after the snapshot unless `at_once`.  A worker that is too far behind is dropped: it
        connects again and begins with a snapshot.
        """
        if self._writer.transport.is_closing():
            return
        if self._held is not None and not at_once:
            self._held.append(frame)
            self._held_bytes += len(frame)
        else:
            self._writer.write(frame)
        if self._held_bytes + self._writer.transport.get_write_buffer_size() > MAX_BEHIND:
            _log.warning("dropped a worker that does not keep up", pid=self.pid)
            self.abort()

    def live(self) -> None:
        """The snapshot is complete: send what was held, hold no more."""
        held, self._held, self._held_bytes = self._held or [], None, 0
        for frame in held:
            self.send(frame)

    async def drain(self) -> None:
        """Wait until the worker has taken most of what was sent."""
        await self._writer.drain()

    def abort(self) -> None:
        """Drop the connection at once."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()
