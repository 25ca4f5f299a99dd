"""The services of a worker for its connections: the registry, and everything around the feed."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import Protocol

from dispatcher.common.log import logger
from dispatcher.plugin.errors import DispatcherError
from dispatcher.proxy.edge.http.request import Request
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.net.client import Client
from dispatcher.proxy.edge.net.connect import open_upstream
from dispatcher.proxy.edge.net.events import EventStreams
from dispatcher.proxy.edge.net.registry import Registry
from dispatcher.proxy.edge.net.upstream import Upstream
from dispatcher.proxy.edge.routing.activity import Traffic
from dispatcher.proxy.edge.routing.router import Router
from dispatcher.proxy.edge.routing.settings import Settings
from dispatcher.proxy.edge.routing.table import Agent, Tables


class Waiting(Protocol):
    """An exchange that waits for a connection, or for the manager; `exchange.Exchange` describes the members."""

    def wants(self, agent: Agent) -> bool: ...
    def connected(self, upstream: Upstream) -> None: ...
    def unreachable(self, agent: Agent) -> None: ...
    def looked_up(self, digest: bytes) -> None: ...


class Services(Registry):
    """The part of a worker that its connections use.

    :ivar portal: the portal, as an agent without a name; :ivar serial: number of the last request.
    """

    def __init__(self, settings: Settings, portal_path: str, log: AccessLog) -> None:
        super().__init__(settings, self._new_client)
        self.clock = time.monotonic
        self.tables = Tables()
        self.router = Router(settings, self.tables)
        self.log = log
        self.events = EventStreams(self)
        self.portal = Agent("")
        self.portal.update({"state": "running", "endpoint": f"unix:{portal_path}", "uid": os.geteuid()})
        self.portal.traffic = Traffic()
        self.request_prefix = secrets.token_hex(5).encode()
        self.serial = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._logger = logger("edge")

    def _new_client(self) -> Client:
        raise NotImplementedError

    def request_id(self) -> bytes:
        """Return a new id, unique over workers and restarts."""
        self.serial = serial = self.serial + 1
        return b"%b%08x" % (self.request_prefix, serial)

    def client_of(self, address: str, request: Request) -> tuple[bytes, bytes, bytes]:
        """Return the client's address, the scheme and the host (or nothing) that a trusted proxy states."""
        return self._forwarded.client_of(address, request.fields)

    def fixed_lines(self, request: Request, agent: Agent, remote: bytes, scheme: bytes) -> bytes:
        """Return Host and the edge's own lines: they are the same for all requests of a connection to one host."""
        host = request.host or self.settings.public_host or b"localhost"
        return b"".join(
            (
                *(b"Host: ", host, b"\r\nX-Forwarded-For: ", remote, b"\r\nX-Forwarded-Host: ", host),
                *(b"\r\nX-Forwarded-Proto: ", scheme, b"\r\n", agent.identity if agent.name else b""),
                b"Via: 1.1 dispatcher\r\n" if request.version else b"Via: 1.0 dispatcher\r\n",
            )
        )

    def connect(self, agent: Agent, client: Waiting) -> None:
        """Open a connection for a client's request."""
        task = self.loop.create_task(self._connect(agent, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, agent: Agent, client: Waiting) -> None:
        problem: Exception | None = None
        upstream = None
        try:
            upstream = await open_upstream(self, agent)
        except (OSError, DispatcherError) as error:
            problem = error
        if upstream is not None and upstream.transport.is_closing():
            # The process that accepted it ended before it could be used: the request was not sent.
            problem, upstream = ConnectionRefusedError("closed as soon as it was open"), None
        wanted = client.wants(agent)
        if upstream is not None:
            if wanted:
                client.connected(upstream)
            else:
                upstream.transport.close()
        elif wanted:
            if not isinstance(problem, (ConnectionRefusedError, FileNotFoundError)):
                self._logger.warning("no connection to the agent", agent=agent.name, error=str(problem))
            client.unreachable(agent)

    def log_invalid(self, agent: Agent, request_id: bytes, why: str) -> None:
        """Log an answer that could not be forwarded."""
        self.counters.invalid += 1
        self._logger.warning(
            "invalid HTTP response", agent=agent.name or "portal", request=request_id.decode(), why=why
        )

    # The feed.

    def wake(self, agent: Agent) -> None:
        """Ask the manager to wake an agent."""
        raise NotImplementedError

    def report_dead(self, agent: Agent) -> None:
        """Report to the manager that nothing listens at the agent's endpoint."""
        raise NotImplementedError

    def look_up(self, client: Waiting, digest: bytes) -> bool:
        """Ask the manager about a session that is not in the table; False when it is known not to exist."""
        raise NotImplementedError

    def feed_lost_for_good(self) -> bool:
        """Whether the feed has been lost for longer than `feed_grace`."""
        raise NotImplementedError
