"""Handles the messages of edge workers: lookups, wakes, activity, counters."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from dispatcher.common.log import logger
from dispatcher.feed import protocol
from dispatcher.manager.agents.metrics import clean_counters
from dispatcher.manager.agents.supervisor import Supervisor
from dispatcher.manager.auth.sessions import Sessions
from dispatcher.manager.feed import frames
from dispatcher.manager.feed.sync import SyncTracker
from dispatcher.manager.feed.worker import Worker

MAX_JOBS = 64  # calls in flight for one worker; beyond it the connection is not read
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLASSES = ("use", "stream", "in", "out", "poll", "idle_sockets")

_log = logger("manager.feed")


class ReportHandler:
    """Handles the messages of one worker.  Runs in the feed's event loop.

    :param pool: for calls that may use the database.
    """

    def __init__(
        self, worker: Worker, supervisor: Supervisor, sessions: Sessions, syncs: SyncTracker, pool: Executor
    ) -> None:
        self._worker = worker
        self._supervisor = supervisor
        self._sessions = sessions
        self._syncs = syncs
        self._pool = pool
        self._jobs = asyncio.Semaphore(MAX_JOBS)

    async def on_message(self, message: protocol.Message) -> None:
        """Handle a message; unknown types and malformed messages are ignored."""
        kind = message["type"]
        if kind == protocol.LOOKUP:
            sha256 = message.get("sha256")
            if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
                self._worker.send(self._look_up(sha256), at_once=True)
        elif kind in {protocol.WAKE, protocol.DEAD}:
            name = message.get("agent")
            if isinstance(name, str) and 0 < len(name) <= 300:
                wake, check = self._supervisor.commands.wake, self._supervisor.reconciler.check_endpoint
                await self._run(wake if kind == protocol.WAKE else check, name)
        elif kind == protocol.SYNCED:
            self._syncs.answered(self._worker, message.get("number"))
        elif kind == protocol.ACTIVITY:
            await self._run(self._record_activity, message)
        elif kind == protocol.COUNTERS:
            self._worker.counters = clean_counters(message.get("values"))

    def _look_up(self, sha256: str) -> bytes:
        row = self._sessions.get(sha256)
        if row is None:
            return frames.looked_up(sha256, None, [])
        views = self._supervisor.queries.views(user=row.user)
        session = frames.session_row(row, [view.name for view in views], self._sessions.ttl(row))
        return frames.looked_up(sha256, session, [view.to_feed() for view in views])

    def _record_activity(self, message: protocol.Message) -> None:
        agents, sessions = message.get("agents"), message.get("sessions")
        if isinstance(agents, dict):
            for name, counts in agents.items():
                if isinstance(counts, dict):
                    activity = {key: _count(counts.get(key)) for key in _CLASSES}
                    self._supervisor.commands.record_activity(name, activity)
        if isinstance(sessions, list):
            self._sessions.touch(sha256 for sha256 in sessions if isinstance(sha256, str))

    async def _run(self, work: Callable[..., object], argument: object) -> None:
        """Call `work` in the pool; wait for it only when too many calls are in flight."""
        await self._jobs.acquire()
        future = asyncio.get_running_loop().run_in_executor(self._pool, _logged, work, argument)
        future.add_done_callback(lambda _: self._jobs.release())


def _logged(work: Callable[..., object], argument: object) -> None:
    """Call `work`; log exceptions."""
    try:
        work(argument)
    except Exception:
        _log.exception("a message of the edge could not be handled", call=work.__name__)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0
