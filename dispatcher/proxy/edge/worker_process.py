"""A worker process: loop, listeners, signals, drain.

The parent controls it over a socket pair: the worker writes `READY` once it serves, the parent writes `DRAIN`
to drain it while another worker takes the new connections, or `STOP` without one; the worker answers `CLOSED` when
it accepts no more.  End of file means that the parent has ended, and the worker ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dispatcher.common.log import logger
from dispatcher.plugin.deadline import boottime
from dispatcher.proxy.edge.net.access_log import AccessLog
from dispatcher.proxy.edge.net.handshakes import Handshakes
from dispatcher.proxy.edge.net.listener import Listener
from dispatcher.proxy.edge.routing.settings import Settings
from dispatcher.proxy.edge.worker import Worker
from dispatcher.proxy.privileges import keep_buffers, most_connections

if TYPE_CHECKING:
    from dispatcher.config.layout import Paths
    from dispatcher.config.load import Config

READY = b"R"
CLOSED = b"C"
DRAIN = b"D"
STOP = b"S"

_BACKLOG = 4096
_ROLLING_GRACE = (
    5.0  # seconds for a kept-alive connection to send its next request, which is answered with Connection: close
)
_STOP_GRACE = 0.5
_CLOSE_GRACE = 1.5  # seconds for WebSockets to take their Close frame
_FEED_TIMEOUT = 3.0  # seconds to wait for the first tables; then the worker serves without them


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """What a worker inherits from the parent.

    :ivar listeners: sockets for clients; :ivar redirects: sockets that only redirect to HTTPS.
    :ivar tls: None without TLS; :ivar access_log: open file, None when there is none.
    """

    listeners: Sequence[socket.socket]
    redirects: Sequence[socket.socket] = ()
    tls: ssl.SSLContext | None = None
    access_log: int | None = None


class Process:
    """One worker process."""

    def __init__(self, config: Config, paths: Paths, inherited: Inherited, control: socket.socket) -> None:
        self._config = config
        self._settings = Settings(config)
        self._settings.connections = most_connections(self._settings.connections)
        self._inherited = inherited
        self._control = control
        self._worker = Worker(
            self._settings,
            str(paths.feed_socket),
            str(paths.portal_socket),
            AccessLog(inherited.access_log),
        )
        self._acceptors: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop
        self._finished: asyncio.Event
        self._drain_until = 0.0
        self._grace_until = 0.0
        self._tunnels_kept = False
        self._log = logger("edge")

    async def main(self) -> None:
        """Serve until the order to stop."""
        loop = self._loop = asyncio.get_running_loop()
        self._finished = asyncio.Event()
        loop.set_exception_handler(self._unexpected)
        loop.add_signal_handler(signal.SIGTERM, self._drain, _STOP_GRACE)
        for number in (signal.SIGINT, signal.SIGHUP):  # the parent's business
            loop.add_signal_handler(number, lambda: None)
        worker = self._worker
        worker.start(loop)
        # The first request after a restart finds its session: connections wait in the queue meanwhile.
        await worker.feed.first(_FEED_TIMEOUT)
        self._listen()
        self._control.setblocking(False)
        loop.add_reader(self._control, self._on_order)
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000)  # requests leave no cycles behind
        self._control.send(READY)
        await self._finished.wait()
        worker.close()
        await asyncio.sleep(0)

    def _listen(self) -> None:
        worker, inherited = self._worker, self._inherited
        for sock in inherited.listeners:
            header = self._config.proxy.proxy_protocol
            if inherited.tls is not None or header:
                self._acceptors.append(Handshakes(worker.clients, sock, inherited.tls, header=header))
            else:
                self._acceptors.append(Listener(worker.clients, sock))
        for sock in inherited.redirects:
            self._acceptors.append(Listener(worker.clients, sock, to_https=True))
        for acceptor in self._acceptors:
            acceptor.start()

    def _on_order(self) -> None:
        try:
            order = self._control.recv(1)
        except BlockingIOError:
            return
        except OSError:
            order = b""
        if order == DRAIN:
            self._drain(_ROLLING_GRACE, keep_tunnels=True)
        elif order == STOP:
            self._drain(_STOP_GRACE)
        else:
            # The parent is gone.  The next proxy needs the addresses: close the listeners at once.
            self._loop.remove_reader(self._control)
            self._drain(0.0)
            self._drain_until = boottime() + min(2.0, self._settings.drain_timeout)

    def _drain(self, grace: float, *, keep_tunnels: bool = False) -> None:
        """Drain: finish the work in progress.

        :param grace: seconds for kept-alive connections to send one more request.
        :param keep_tunnels: WebSockets stay for as long as draining may take; else they are closed at once.
        """
        if self._drain_until:
            return
        now = boottime()
        self._drain_until = now + self._settings.drain_timeout
        self._grace_until = now + min(grace, self._settings.drain_timeout / 2)
        for acceptor in self._acceptors:
            acceptor.close()
        with contextlib.suppress(OSError):  # the parent may be gone
            self._control.send(CLOSED)
        self._worker.drain()
        self._tunnels_kept = keep_tunnels
        if not keep_tunnels:
            self._worker.clients.shut_tunnels()
        # Not at once: connections that were just accepted are not counted yet.
        self._loop.call_later(0.05, self._still_draining)

    def _still_draining(self) -> None:
        now = boottime()
        worker = self._worker
        if now >= self._grace_until:
            worker.clients.close_idle()
        if now >= self._drain_until and self._tunnels_kept:
            self._tunnels_kept = False
            self._drain_until = now + _CLOSE_GRACE
            worker.clients.shut_tunnels()
        elif not (worker.clients.open or worker.clients.handshakes) or now >= self._drain_until:
            if worker.clients.open:
                self._log.warning("connections were cut off", number=worker.clients.open)
            self._finished.set()
            return
        self._loop.call_later(0.05, self._still_draining)

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Log an exception that no protocol handled; a fault of one connection must not end the worker."""
        del loop
        error = context.get("exception")
        if isinstance(error, (ConnectionError, ssl.SSLError, TimeoutError)):
            self._log.debug("a connection failed", why=str(context.get("message")), error=str(error))
            return
        self._log.error(
            "unexpected", why=str(context.get("message")), exc_info=error if isinstance(error, Exception) else None
        )


def run(config: Config, paths: Paths, inherited: Inherited, control: socket.socket) -> None:
    """Run a worker process until the order to stop."""
    import uvloop

    keep_buffers()
    process = Process(config, paths, inherited, control)
    uvloop.install()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(process.main())
    finally:
        loop.close()
