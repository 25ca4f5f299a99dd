"""Waiting until the edge knows: a sign-out is answered when its cookie is dead on every worker.

Frames go out in order, so a worker that answers a `sync` has applied all that was sent before it.  Touches the
workers' transports; lives in the feed's loop.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from dispatcher.feed import protocol
from dispatcher.manager.feed.worker import Worker


class Syncs:
    """Who still has to answer what."""

    def __init__(self) -> None:
        self._number = 0
        self._open: dict[int, tuple[set[Worker], threading.Event]] = {}

    def ask(self, workers: Collection[Worker], done: threading.Event) -> None:
        """Ask all workers that answer such a question; set `done` when they have, or are gone."""
        asked = {worker for worker in workers if worker.answers and not worker.late}
        if not asked:
            done.set()
            return
        self._number += 1
        self._open[self._number] = (asked, done)
        frame = protocol.encode({"type": protocol.SYNC, "number": self._number})
        for worker in asked:
            worker.send(frame)

    def heard(self, worker: Worker, number: object) -> None:
        """A worker has applied everything up to a question."""
        worker.late = False
        if isinstance(number, int) and number in self._open:
            self._leave(worker, number)

    def gone(self, worker: Worker) -> None:
        """A worker is no longer connected: it begins anew with a snapshot."""
        for number in list(self._open):
            self._leave(worker, number)

    def forget(self, done: threading.Event) -> None:
        """Nobody waits any more.  Who has not answered is not waited for again until it does: it hangs."""
        for number, (asked, event) in list(self._open.items()):
            if event is done:
                for worker in asked:
                    worker.late = True
                del self._open[number]

    def _leave(self, worker: Worker, number: int) -> None:
        asked, done = self._open[number]
        asked.discard(worker)
        if not asked:
            del self._open[number]
            done.set()
