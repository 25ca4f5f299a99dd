"""The connection of one edge worker: sends frames in order, handles the worker's messages.

Runs in the feed's event loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from dispatcher.common.log import logger
from dispatcher.feed import protocol
from dispatcher.manager.agents.agent import AgentView
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.manager.auth.sessions import Sessions
from dispatcher.manager.auth.tokens import ApiTokens
from dispatcher.manager.feed import frames
from dispatcher.manager.feed.frames import Row
from dispatcher.manager.metrics import clean_counters
from dispatcher.plugin.deadline import boottime

HELLO_TIMEOUT = 10.0  # seconds for the worker's hello
MAX_BEHIND = 32 * 1024 * 1024  # unsent bytes beyond which a worker is disconnected
MAX_JOBS = 64  # calls in flight; beyond it the connection is not read
MAX_UP_FRAME = 4 * 1024 * 1024  # bytes
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLASSES = ("use", "stream", "in", "out", "poll", "idle_sockets")

_log = logger("manager.feed")


class Worker:
    """One worker.

    :param pool: for calls that may use the database or take long.
    :param snapshot: returns the frames of a snapshot; called in the pool.
    :param agent_row: returns AGENT.
    :ivar counters: as last reported; :ivar confirms: it answers `sync` frames in time.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        supervisor: Supervisor,
        sessions: Sessions,
        tokens: ApiTokens,
        pool: Executor,
        snapshot: Callable[[], Iterator[bytes]],
        agent_row: Callable[[AgentView], Row],
    ) -> None:
        self.pid = 0
        self.counters: dict[str, float] = {}
        self.confirms = False
        self.task = asyncio.current_task()
        self._reader = reader
        self._writer = writer
        self._supervisor = supervisor
        self._sessions = sessions
        self._tokens = tokens
        self._pool = pool
        self._snapshot = snapshot
        self._agent_row = agent_row
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] | None = []  # changes that wait behind the snapshot; None: it is sent
        self._held_bytes = 0
        self._jobs = asyncio.Semaphore(MAX_JOBS)
        self._syncs = 0
        self._unanswered: dict[int, asyncio.Future[None]] = {}

    async def serve(self) -> None:
        """Serve the connection until it ends."""
        try:
            await self._serve()
        except (protocol.FrameError, asyncio.TimeoutError) as error:
            _log.warning("disconnected a worker", pid=self.pid, why=str(error) or "it sent no hello in time")
        except (OSError, asyncio.CancelledError):
            pass
        except Exception:
            _log.exception("a worker's connection failed", pid=self.pid)
        finally:
            for number in list(self._unanswered):  # it begins again with a snapshot
                self._answered(number)
            self._writer.close()
            _log.info("worker disconnected", pid=self.pid)

    async def _serve(self) -> None:
        self.send(frames.hello(self._supervisor.installation, boottime()), at_once=True)
        messages = self._messages()
        hello = await asyncio.wait_for(messages.__anext__(), HELLO_TIMEOUT)
        if hello["type"] != protocol.HELLO:
            raise protocol.FrameError("the first frame is not a hello")
        if hello.get("version") != protocol.VERSION:
            self.send(frames.error(f"this manager supports version {protocol.VERSION} of the feed"), at_once=True)
            raise protocol.FrameError(f"version {hello.get('version')!r} of the feed")
        pid = hello.get("pid")
        self.pid = pid if isinstance(pid, int) else 0
        self.confirms = hello.get("sync") is True
        _log.info("worker connected", pid=self.pid)
        feeding = asyncio.ensure_future(self._send_snapshot())
        try:
            async for message in messages:
                await self._on_message(message)
        finally:
            feeding.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await feeding

    async def _messages(self) -> AsyncIterator[protocol.Message]:
        decoder = protocol.Decoder(MAX_UP_FRAME)
        while data := await self._reader.read(65536):
            for message in decoder.feed(data):
                yield message
        raise ConnectionResetError

    # --- down

    def send(self, frame: bytes, *, at_once: bool = False) -> None:
        """Send a frame, after the snapshot unless `at_once`.

        A worker that is too far behind is disconnected: it connects again and begins with a snapshot.
        """
        transport = self._writer.transport
        if transport.is_closing():
            return
        if self._held is not None and not at_once:
            self._held.append(frame)
            self._held_bytes += len(frame)
        else:
            self._writer.write(frame)
        if self._held_bytes + transport.get_write_buffer_size() > MAX_BEHIND:
            _log.warning("disconnected a worker that is too far behind", pid=self.pid)
            transport.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()

    def sync(self) -> asyncio.Future[None]:
        """Send a `sync`.

        :return: is done when the worker has applied all frames up to now, or is disconnected.
        """
        self._syncs += 1
        answer = self._unanswered[self._syncs] = self._loop.create_future()
        self.send(protocol.encode({"type": protocol.SYNC, "number": self._syncs}))
        return answer

    def _answered(self, number: object) -> None:
        answer = self._unanswered.pop(number, None) if isinstance(number, int) else None
        if answer and not answer.done():
            answer.set_result(None)

    async def _send_snapshot(self) -> None:
        try:
            parts = await self._loop.run_in_executor(self._pool, self._snapshot)
            while part := await self._loop.run_in_executor(self._pool, next, parts, b""):
                self.send(part, at_once=True)
                await self._writer.drain()
        except (OSError, asyncio.CancelledError):
            raise
        except Exception:
            _log.exception("the snapshot failed", pid=self.pid)
            self.abort()
            return
        held, self._held, self._held_bytes = self._held or [], None, 0
        for frame in held:
            self.send(frame)

    # --- up

    async def _on_message(self, message: protocol.Message) -> None:
        """Handle a message; unknown types and malformed messages are ignored."""
        kind = message["type"]
        if kind == protocol.LOOKUP:
            sha256 = message.get("sha256")
            if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
                self.send(self._look_up(sha256), at_once=True)
        elif kind in {protocol.WAKE, protocol.DEAD}:
            name = message.get("agent")
            if isinstance(name, str) and 0 < len(name) <= 300:
                wake, check = self._supervisor.commands.wake, self._supervisor.reconciler.check_endpoint
                await self._run(wake if kind == protocol.WAKE else check, name)
        elif kind == protocol.SYNCED:
            self.confirms = True  # again, if the last answer came late
            self._answered(message.get("number"))
        elif kind == protocol.ACTIVITY:
            await self._run(self._record_activity, message)
        elif kind == protocol.COUNTERS:
            self.counters = clean_counters(message.get("values"))

    def _look_up(self, sha256: str) -> bytes:
        row = self._sessions.get(sha256)
        if row is None:
            return frames.looked_up(sha256, None, [])
        views = self._supervisor.queries.views(user=row.user)
        session = frames.session_row(row, [view.name for view in views], self._sessions.ttl(row))
        return frames.looked_up(sha256, session, [self._agent_row(view) for view in views])

    def _record_activity(self, message: protocol.Message) -> None:
        agents, sessions, tokens = message.get("agents"), message.get("sessions"), message.get("tokens")
        if isinstance(agents, dict):
            for name, counts in agents.items():
                if isinstance(counts, dict):
                    activity = {key: _count(counts.get(key)) for key in _CLASSES}
                    self._supervisor.commands.record_activity(name, activity)
        if isinstance(sessions, list):
            self._sessions.touch(sha256 for sha256 in sessions if isinstance(sha256, str))
        if isinstance(tokens, list):
            self._tokens.touch(sha256 for sha256 in tokens if isinstance(sha256, str))

    async def _run(self, work: Callable[..., object], argument: object) -> None:
        """Call `work` in the pool; wait for it only when too many calls are in flight."""
        await self._jobs.acquire()
        future = self._loop.run_in_executor(self._pool, _logged, work, argument)
        future.add_done_callback(lambda _: self._jobs.release())


def _logged(work: Callable[..., object], argument: object) -> None:
    """Call `work`; log exceptions."""
    try:
        work(argument)
    except Exception:
        _log.exception("a message of the edge could not be handled", call=work.__name__)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0
