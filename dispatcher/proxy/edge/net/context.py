"""The state that all connections of a worker share, and the worker's link to the manager."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from dispatcher.common.log import logger
from dispatcher.plugin.deadline import boottime
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.net.counters import Counters
from dispatcher.proxy.edge.routing.router import Router
from dispatcher.proxy.edge.routing.settings import COLLECTED, Settings
from dispatcher.proxy.edge.routing.table import Agent, Tables

_MAX_WARNED: Final = 1000
_FAILURES: Final = 60.0  # failed requests that are logged at once; further ones, one a second
_LAST_BYTES: Final = [b"%02x" % byte for byte in range(256)]


class Manager(Protocol):
    """The manager, as the connections use it; `worker.Worker` implements it."""

    def wake(self, agent: Agent) -> None:
        """Ask the manager to wake an agent."""

    def report_dead(self, agent: Agent) -> None:
        """Report to the manager that nothing listens at the agent's endpoint."""

    def look_up(self, exchange: Any, digest: bytes) -> bool:
        """Ask about a session that is not in the table; False when it is known not to exist."""
        ...

    def lost_for_good(self) -> bool:
        """Whether the feed has been lost for longer than `feed_grace`."""
        ...


class Context:
    """What the connections of a worker share.

    :ivar now: boot time in seconds, as of the last turn of the timer wheel; :ivar clock: the exact time.
    :ivar date_line: the Date field of this second; :ivar draining: no new work is accepted.
    :ivar portal: the portal, as an agent without a name; :ivar serial: number of the last request.
    :ivar collected: bytes of bodies for the portal that are not complete yet; :ivar most_collected: their limit.
    :ivar next_slow: when the next of the slow TLS connections is read.
    :ivar connect: opens a connection to an agent for an exchange, see `connect.Connector`.
    """

    loop: asyncio.AbstractEventLoop
    manager: Manager
    connect: Callable[[Agent, Any], None]

    def __init__(self, settings: Settings, portal_path: str, log: AccessLog) -> None:
        self.settings = settings
        self.log = log
        self.logger = logger("edge")
        self.now = boottime()
        self.clock: Callable[[], float] = time.monotonic
        self.date_line = b""
        self.draining = False
        self.counters = Counters(by_agent=settings.metrics_by_agent)
        self.tables = Tables()
        self.router = Router(settings, self.tables)
        self.portal = Agent("")
        self.portal.update({"state": "running", "endpoint": f"unix:{portal_path}", "uid": os.geteuid()})
        self.request_prefix = secrets.token_hex(5).encode()
        self.serial = 0
        self._block = self.request_prefix + b"000000"
        self.collected = 0
        self.most_collected = COLLECTED
        self.next_slow = 0.0
        self._warned: set[tuple[str, str]] = set()
        self._next_failure = 0.0

    def request_id(self) -> bytes:
        """Return a new id, unique over workers and restarts."""
        self.serial = serial = self.serial + 1
        if not serial & 255:
            self._block = b"%b%06x" % (self.request_prefix, serial >> 8)
        return self._block + _LAST_BYTES[serial & 255]

    def warn_once(self, what: str, agent: str, target: bytes) -> None:
        """Log for the operator what an app does in vain, once for each agent."""
        if (what, agent) not in self._warned and len(self._warned) < _MAX_WARNED:
            self._warned.add((what, agent))
            self.logger.warning(what, agent=agent, path=target.partition(b"?")[0].decode("ascii"))

    def log_failure(self, agent: Agent | None, request_id: bytes, title: str) -> None:
        """Log why a person got a page with a request's id and no answer of an agent, a bounded number of times."""
        if self.now >= self._next_failure:
            self._next_failure = max(self._next_failure, self.now - _FAILURES) + 1.0
            self.logger.warning(
                "a request failed", agent=agent.name if agent else "", request=request_id.decode(), why=title
            )

    def log_invalid(self, agent: Agent, request_id: bytes, why: str) -> None:
        """Log an answer that could not be forwarded."""
        self.counters.invalid += 1
        self.logger.warning(
            "invalid HTTP response", agent=agent.name or "portal", request=request_id.decode(), why=why
        )
