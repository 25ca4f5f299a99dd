"""The connection of one edge worker.  Runs in the feed's event loop."""

from __future__ import annotations

import asyncio
import enum
from typing import Any

from dispatcher.common.log import logger

MAX_BEHIND = 32 * 1024 * 1024  # unsent bytes beyond which a worker is disconnected

_log = logger("manager.feed")


class SyncState(enum.Enum):
    """How a worker answers `sync` frames."""

    UNSUPPORTED = enum.auto()
    IN_TIME = enum.auto()
    LATE = enum.auto()  # it did not answer the last one in time


class Worker:
    """Sends frames in order: until the snapshot is complete, changes wait behind it."""

    def __init__(self, writer: asyncio.StreamWriter, task: asyncio.Task[Any] | None) -> None:
        self.pid = 0
        self.sync = SyncState.UNSUPPORTED
        self.counters: dict[str, float] = {}
        self.task = task
        self._writer = writer
        self._held: list[bytes] | None = []
        self._held_bytes = 0

    def send(self, frame: bytes, *, at_once: bool = False) -> None:
        """Send a frame, after the snapshot unless `at_once`.

        A worker that is too far behind is disconnected: it connects again and begins with a snapshot.
        """
        if self._writer.transport.is_closing():
            return
        if self._held is not None and not at_once:
            self._held.append(frame)
            self._held_bytes += len(frame)
        else:
            self._writer.write(frame)
        if self._held_bytes + self._writer.transport.get_write_buffer_size() > MAX_BEHIND:
            _log.warning("disconnected a worker that is too far behind", pid=self.pid)
            self.abort()

    def snapshot_sent(self) -> None:
        """The snapshot is complete: send the held frames."""
        held, self._held, self._held_bytes = self._held or [], None, 0
        for frame in held:
            self.send(frame)

    async def drain(self) -> None:
        """Wait until the worker has read most of what was sent."""
        await self._writer.drain()

    def abort(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()
