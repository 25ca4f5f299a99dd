"""The worker's connection to the manager's feed, whose messages `routing.table` applies.

It reconnects by itself, with a back-off.  While it is down the worker keeps its tables; nothing is queued for the
manager, because the next report contains the totals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

from dispatcher.client import trust
from dispatcher.common.log import logger
from dispatcher.feed import protocol
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import ManagerUnreachable

_FIRST_PAUSE = 0.05
_RESTARTING = 10.0  # seconds that a manager may be away before connects become rarer
_SHORT_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


class Feed(asyncio.Protocol):
    """The connection to the feed, up or down.

    :ivar lost_at: boot time since which there is no complete feed; 0 while there is one.
    """

    def __init__(
        self,
        path: str,
        on_message: Callable[[dict[str, Any]], None],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self._path = path
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._transport: asyncio.WriteTransport | None = None
        self._pause = _FIRST_PAUSE
        self._task: asyncio.Task[None] | None = None
        self._last_message = boottime()
        self._closed = False
        self._log = logger("edge")
        self._complained = False
        self.lost_at = boottime()
        self._first = asyncio.Event()
        self._ended = asyncio.Event()
        self._decoder = protocol.Decoder()

    @property
    def complete(self) -> bool:
        """Whether the tables are complete and current."""
        return not self.lost_at

    def open(self) -> None:
        """Connect, and reconnect whenever necessary."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def first(self, timeout: float) -> None:
        """Wait for the first complete tables, for a limited time."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._first.wait(), timeout)

    def close(self) -> None:
        """Stop."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message; False when the feed is down."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(protocol.encode(message))
        return True

    def check(self) -> None:
        """Detect silence; called about once a second."""
        if self._transport is not None and boottime() - self._last_message > protocol.SILENCE:
            self._log.warning("the feed is silent, reconnecting", seconds=protocol.SILENCE)
            self._transport.abort()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closed:
            self._decoder = protocol.Decoder()
            self._ended.clear()
            try:
                await loop.create_unix_connection(lambda: self, self._path)
                await self._ended.wait()
            except OSError as error:
                if not self._complained:
                    self._log.warning("the manager's feed cannot be reached", path=self._path, error=str(error))
                    self._complained = True
            await asyncio.sleep(self._pause)
            away = self.lost_at and boottime() - self.lost_at > _RESTARTING
            self._pause = min(self._pause * 2, _LONGEST_PAUSE if away else _SHORT_PAUSE)

    # The transport's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        try:
            trust.check_peer(transport.get_extra_info("socket"), self._path)
        except ManagerUnreachable as error:
            self._log.error("the feed's socket does not belong to the manager", path=self._path, why=error.why)
            transport.abort()  # type: ignore[attr-defined]
            return
        self._transport = transport  # type: ignore[assignment]
        self._last_message = boottime()
        hello = {"type": protocol.HELLO, "version": protocol.VERSION, "pid": os.getpid(), "sync": True}
        self.send(hello)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._take(message)
        except (protocol.FrameError, KeyError, TypeError, ValueError) as error:
            self._log.error("invalid frame in the feed", error=repr(error))
            if self._transport is not None:
                self._transport.abort()

    def _take(self, message: dict[str, Any]) -> None:
        self._last_message = boottime()
        kind = message["type"]
        if kind == protocol.ERROR or (kind == protocol.HELLO and message.get("version") != protocol.VERSION):
            why = message.get("what") or f"the manager supports version {message.get('version')} of the feed"
            self._log.error("the manager refuses the feed", why=str(why))
            if self._transport is not None:
                self._transport.abort()
            return
        self._on_message(message)
        if kind == protocol.SNAPSHOT and message.get("last"):
            self._pause = _FIRST_PAUSE
            if self._complained:
                self._log.info("the manager's feed is back")
                self._complained = False
            self.lost_at = 0.0
            self._first.set()
            self._on_up()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._ended.set()
        self._transport = None
        if not self.lost_at:
            self.lost_at = boottime()
        if not self._closed:
            if not self._complained:
                self._log.warning("the manager's feed is lost, serving the known sessions")
                self._complained = True
            self._on_down()
