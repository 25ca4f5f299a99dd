"""What the edge's workers report: lookups, wakes, activity, counters.  Touches the supervisor and the sessions."""

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
from dispatcher.manager.feed.sync import Syncs
from dispatcher.manager.feed.worker import Worker

MAX_JOBS = 64  # calls in flight for one worker; it is not read any further until some are done
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLASSES = ("use", "stream", "in", "out", "poll", "idle_sockets")

_log = logger("manager.feed")


class Reports:
    """Acts on the messages of one worker.  Lives in the feed's loop.

    :param pool: for what may touch the database.
    """

    def __init__(
        self, worker: Worker, supervisor: Supervisor, sessions: Sessions, syncs: Syncs, pool: Executor
    ) -> None:
        self._worker = worker
        self._supervisor = supervisor
        self._sessions = sessions
        self._syncs = syncs
        self._pool = pool
        self._jobs = asyncio.Semaphore(MAX_JOBS)

    async def hear(self, message: protocol.Message) -> None:
        """React to what a worker says; unknown types are ignored, and so is what is malformed."""
        kind = message["type"]
        if kind == protocol.LOOKUP:
            sha256 = message.get("sha256")
            if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
                self._worker.send(self._look_up(sha256), at_once=True)
        elif kind in {protocol.WAKE, protocol.DEAD}:
            name = message.get("agent")
            if isinstance(name, str) and 0 < len(name) <= 300:
                act = self._supervisor.wake if kind == protocol.WAKE else self._supervisor.suspect
                await self._job(act, name)
        elif kind == protocol.SYNCED:
            self._syncs.heard(self._worker, message.get("number"))
        elif kind == protocol.ACTIVITY:
            await self._job(self._note, message)
        elif kind == protocol.COUNTERS:
            self._worker.counters = clean_counters(message.get("values"))

    def _look_up(self, sha256: str) -> bytes:
        row = self._sessions.get(sha256)
        if row is None:
            return frames.looked_up(sha256, None, [])
        views = self._supervisor.views(user=row.user)
        session = frames.session_row(row, [view.name for view in views], self._sessions.ttl(row))
        return frames.looked_up(sha256, session, [view.to_feed() for view in views])

    def _note(self, message: protocol.Message) -> None:
        """Pass on who was used."""
        agents, sessions = message.get("agents"), message.get("sessions")
        if isinstance(agents, dict):
            for name, counts in agents.items():
                if isinstance(counts, dict):
                    self._supervisor.touch(name, {key: _count(counts.get(key)) for key in _CLASSES})
        if isinstance(sessions, list):
            self._sessions.touch(sha256 for sha256 in sessions if isinstance(sha256, str))

    async def _job(self, work: Callable[..., object], argument: object) -> None:
        """Do something in the pool, without waiting for it unless too much is going on."""
        await self._jobs.acquire()
        future = asyncio.get_running_loop().run_in_executor(self._pool, contained, work, argument)
        future.add_done_callback(lambda _: self._jobs.release())


def contained(work: Callable[..., object], argument: object) -> None:
    """Call `work`; log what it raises."""
    try:
        work(argument)
    except Exception:
        _log.exception("what the edge reported could not be acted on", what=work.__name__)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0
