"""Waiting until the edge has applied a change: a sign-out is answered when its cookie is invalid on every worker.

Frames are sent in order, so a worker that answers a `sync` has applied everything sent before it.  Runs in the
feed's event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from dispatcher.feed import protocol
from dispatcher.manager.feed.worker import SyncState, Worker


class SyncTracker:
    """The workers that have yet to answer a `sync`."""

    def __init__(self) -> None:
        self._number = 0
        self._open: dict[int, tuple[set[Worker], threading.Event]] = {}

    def request(self, workers: Collection[Worker], done: threading.Event) -> None:
        """Send a `sync` to all workers that answer it; set `done` when they have, or are disconnected."""
        asked = {worker for worker in workers if worker.sync is SyncState.IN_TIME}
        if not asked:
            done.set()
            return
        self._number += 1
        self._open[self._number] = (asked, done)
        frame = protocol.encode({"type": protocol.SYNC, "number": self._number})
        for worker in asked:
            worker.send(frame)

    def answered(self, worker: Worker, number: object) -> None:
        """A worker has applied everything up to a `sync`."""
        if worker.sync is SyncState.LATE:
            worker.sync = SyncState.IN_TIME
        if isinstance(number, int) and number in self._open:
            self._remove(worker, number)

    def disconnected(self, worker: Worker) -> None:
        """A worker is disconnected: it begins again with a snapshot."""
        for number in list(self._open):
            self._remove(worker, number)

    def give_up(self, done: threading.Event) -> None:
        """Stop waiting.  A worker that has not answered hangs: the next `sync` does not wait for it."""
        for number, (asked, event) in list(self._open.items()):
            if event is done:
                for worker in asked:
                    worker.sync = SyncState.LATE
                del self._open[number]

    def _remove(self, worker: Worker, number: int) -> None:
        asked, done = self._open[number]
        asked.discard(worker)
        if not asked:
            del self._open[number]
            done.set()
