"""The feed's server: sends agents and sessions to the edge (docs/reference/feed.md).

One thread with one event loop serves all workers.  Changes are collected for a few milliseconds and encoded once
for all workers.  Calls that may use the database or take a lock for long run in a small pool.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress

from dispatcher.common.api_tokens import allows
from dispatcher.common.log import logger
from dispatcher.common.peer_credentials import peer_credentials
from dispatcher.feed import protocol
from dispatcher.manager.agents.agent import AgentView, default_agent
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.manager.auth.sessions import Sessions
from dispatcher.manager.auth.tokens import ApiTokens
from dispatcher.manager.feed import frames
from dispatcher.manager.feed.worker_connection import Worker
from dispatcher.manager.storage.tokens import TokenRow
from dispatcher.plugin.errors import NotFound

DEBOUNCE = 0.004  # seconds between two frames of changes
MAX_WORKERS = 300
SYNC_TIMEOUT = 1.0  # seconds to wait until all workers have applied a change

_log = logger("manager.feed")


class Feed:
    """Serves the feed on one listening socket.

    :param sock: bound; :param allowed: whether a process may connect, by user id and group id.
    :param statement: returns what the edge passes to an agent about its user, None for nothing.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        supervisor: Supervisor,
        sessions: Sessions,
        tokens: ApiTokens,
        allowed: Callable[[int, int], bool],
        statement: Callable[[AgentView], str | None] = lambda _view: None,
    ) -> None:
        self._sock = sock
        self._supervisor = supervisor
        self._sessions = sessions
        self._tokens = tokens
        self._allowed = allowed
        self._statement = statement
        self._pool = ThreadPoolExecutor(4, "dispatcher-feed")
        self._workers: set[Worker] = set()
        self._agents_of: dict[str, dict[str, None]] = {}
        self._lock = threading.Lock()
        self._changed_agents: dict[str, None] = {}
        self._changed_sessions: dict[str, None] = {}
        self._gone_sessions: dict[str, None] = {}
        self._changed_tokens: dict[str, None] = {}
        self._gone_tokens: dict[str, None] = {}
        self._scheduled = False
        self._flushed_at = 0.0
        self._stop = asyncio.Event()
        self._serving = threading.Event()

    def start(self) -> None:
        """Subscribe and listen; returns once the socket is served."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="dispatcher-feed", daemon=True)
        self._supervisor.registry.subscribe(self.agent_changed)
        self._sessions.subscribe(self.sessions_changed)
        self._tokens.subscribe(self.tokens_changed)
        for view in self._supervisor.queries.views():
            self._agents_of.setdefault(view.user, {})[view.name] = None
        self._thread.start()
        self._serving.wait(10)

    def close(self) -> None:
        """Close all connections; the edge continues with its last tables."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def connections(self) -> int:
        """How many workers are connected."""
        return len(self._workers)

    def counters(self) -> dict[str, dict[str, float]]:
        """Return the counters of each connected worker, by its process id."""
        return {str(worker.pid): worker.counters for worker in list(self._workers) if worker.counters}

    # --- from other threads

    def agent_changed(self, name: str) -> None:
        """An agent changed or is gone."""
        with self._lock:
            self._changed_agents[name] = None
        self._schedule()

    def sessions_changed(self, changed: Collection[str], gone: Collection[str]) -> None:
        """Sessions changed or are gone."""
        with self._lock:
            self._changed_sessions.update(dict.fromkeys(changed))
            self._gone_sessions.update(dict.fromkeys(gone))
        self._schedule()

    def tokens_changed(self, changed: Collection[str], gone: Collection[str]) -> None:
        """API tokens changed or are gone."""
        with self._lock:
            self._changed_tokens.update(dict.fromkeys(changed))
            self._gone_tokens.update(dict.fromkeys(gone))
        self._schedule()

    def synchronize(self) -> bool:
        """Wait for a moment until every connected worker has applied all changes so far.

        Frames are sent in order, so a worker that answers a `sync` has applied everything sent before it.

        :return: whether all have.  A worker that is not connected begins again with a snapshot.
        """
        if not (self._serving.is_set() and self._loop.is_running()):  # the manager starts or ends
            return False
        try:
            confirmed = asyncio.run_coroutine_threadsafe(self._confirmed(), self._loop).result(2 * SYNC_TIMEOUT)
        except (FutureTimeout, CancelledError):
            confirmed = False
        if not confirmed:
            _log.warning("not every worker has confirmed the changes in time", workers=len(self._workers))
        return confirmed

    def _schedule(self) -> None:
        with self._lock:
            if self._scheduled:
                return
            self._scheduled = True
        with suppress(RuntimeError):  # the loop is closed: the manager ends
            self._loop.call_soon_threadsafe(self._flush_soon)

    # --- in the loop

    def _flush_soon(self) -> None:
        """Send the first change at once, those right after it together."""
        wait = self._flushed_at + DEBOUNCE - self._loop.time()
        if wait > 0:
            self._loop.call_later(wait, self._flush)
        else:
            self._flush()

    async def _confirmed(self) -> bool:
        self._flush()
        answers = {worker.sync(): worker for worker in self._workers if worker.confirms}
        late = (await asyncio.wait(answers, timeout=SYNC_TIMEOUT))[1] if answers else ()
        for answer in late:
            answers[answer].confirms = False  # it hangs: the next sync does not wait for it
        return not late

    def _flush(self) -> None:
        self._flushed_at = self._loop.time()
        with self._lock:
            self._scheduled = False
            names, self._changed_agents = self._changed_agents, {}
            changed, self._changed_sessions = self._changed_sessions, {}
            gone, self._gone_sessions = self._gone_sessions, {}
            changed_tokens, self._changed_tokens = self._changed_tokens, {}
            gone_tokens, self._gone_tokens = self._gone_tokens, {}
        agents, agents_gone, touched = self._agent_rows(names)
        for user in touched:
            changed.update((row.sha256, None) for row in self._sessions.all(user))
            changed_tokens.update((row.sha256, None) for row in self._tokens.all(user))
        if not self._workers:
            return
        sessions = []
        for sha256 in changed:
            row = self._sessions.get(sha256)
            if row is None:
                gone[sha256] = None
            elif sha256 not in gone:
                agents_of = list(self._agents_of.get(row.user, ()))
                sessions.append(frames.session_row(row, agents_of, self._sessions.ttl(row)))
        found = (self._tokens.get(sha256) for sha256 in changed_tokens if sha256 not in gone_tokens)
        tokens = self._token_rows(row for row in found if row is not None)
        for frame in frames.changes(agents, sessions, agents_gone, list(gone), list(tokens), list(gone_tokens)):
            for worker in list(self._workers):
                worker.send(frame)

    def _agent_rows(self, names: Iterable[str]) -> tuple[list[frames.Row], list[str], set[str]]:
        """Return rows, removed agents, and users whose set of agents changed."""
        rows, gone, touched = [], [], set()
        for name in names:
            user = name.partition(":")[0]
            mine = self._agents_of.setdefault(user, {})
            known = name in mine
            try:
                rows.append(self._agent_row(self._supervisor.queries.view(name)))
                mine[name] = None
            except NotFound:
                gone.append(name)
                mine.pop(name, None)
            if known != (name in mine):
                touched.add(user)
            if not mine:
                del self._agents_of[user]
        return rows, gone, touched

    def _agent_row(self, view: AgentView) -> frames.Row:
        """Return AGENT."""
        row = view.to_feed()
        if (statement := self._statement(view)) is not None:
            row["identity"] = statement
        return row

    def _token_rows(self, rows: Iterable[TokenRow]) -> Iterator[frames.Row]:
        """Yield the rows of tokens that open agents."""
        known: dict[str, tuple[list[str], str]] = {}  # a user may have many tokens
        for row in rows:
            if row.user is not None and allows(row.scopes, "app"):
                if row.user not in known:
                    views = self._supervisor.queries.views(user=row.user)
                    may_use = self._supervisor.access.may_use
                    default = default_agent(row.user, [view for view in views if may_use(view.user, view.app)])
                    known[row.user] = [view.name for view in views], default.name if default else ""
                yield frames.token_row(row, *known[row.user], self._tokens.ttl(row))

    def _snapshot(self) -> Iterator[bytes]:
        """Yield the parts.  Runs in the pool, as it takes a while with many rows."""
        views = self._supervisor.queries.views()
        agents_of: dict[str, list[str]] = {}
        for view in views:
            agents_of.setdefault(view.user, []).append(view.name)
        sessions = self._sessions.all()
        return frames.snapshot(
            (self._agent_row(view) for view in views),
            (frames.session_row(row, agents_of.get(row.user, []), self._sessions.ttl(row)) for row in sessions),
            self._token_rows(self._tokens.all()),
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except Exception:
            _log.exception("the feed ended")
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _main(self) -> None:
        server = await asyncio.start_unix_server(self._accept, sock=self._sock, backlog=MAX_WORKERS)
        self._serving.set()
        pings = asyncio.ensure_future(self._ping())
        await self._stop.wait()
        pings.cancel()
        server.close()
        tasks = [worker.task for worker in list(self._workers) if worker.task]
        for worker in list(self._workers):
            worker.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(pings, *tasks, return_exceptions=True)
        await asyncio.sleep(0.001)  # connections close in the loop's next iteration

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(protocol.PING_INTERVAL)
            for worker in list(self._workers):
                worker.send(frames.PING)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, uid, gid = peer_credentials(writer.get_extra_info("socket"))
        if not self._allowed(uid, gid) or len(self._workers) >= MAX_WORKERS:
            _log.warning("refused a connection", uid=uid, workers=len(self._workers))
            writer.write(frames.error("permission denied"))
            writer.close()
            return
        worker = Worker(
            reader,
            writer,
            supervisor=self._supervisor,
            sessions=self._sessions,
            tokens=self._tokens,
            pool=self._pool,
            snapshot=self._snapshot,
            agent_row=self._agent_row,
        )
        self._workers.add(worker)
        try:
            await worker.serve()
        finally:
            self._workers.discard(worker)
