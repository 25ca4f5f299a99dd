"""Opening connections to upstreams, without blocking the loop.

A Unix endpoint is opened through `checked_unix_path`, so that the socket that was checked is the one that is
connected.  Connecting to it does not wait in the kernel: it works at once, or the listener's queue is full.
"""

from __future__ import annotations

import asyncio
import errno
import socket

from dispatcher.plugin.endpoints import checked_unix_path
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import Endpoint
from dispatcher.proxy.edge.net.context import Context
from dispatcher.proxy.edge.net.upstream import Receiver, Upstream
from dispatcher.proxy.edge.routing.settings import CONNECT_TIMEOUT
from dispatcher.proxy.edge.routing.table import Agent

_FULL_PAUSE = 0.01  # seconds between two tries while a listener's queue is full
_FULL_TRIES = 200


class Connector:
    """Opens connections for exchanges; `tasks` are the ones in progress."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.tasks: set[asyncio.Task[None]] = set()

    def connect(self, agent: Agent, exchange: Receiver) -> None:
        """Open a connection to the agent and give it to the exchange."""
        task = self._context.loop.create_task(self._connect(agent, exchange))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _connect(self, agent: Agent, exchange: Receiver) -> None:
        problem: Exception
        try:
            upstream = Upstream(self._context, agent)
            await asyncio.wait_for(_open(upstream, Endpoint.parse(agent.endpoint), agent.uid), CONNECT_TIMEOUT)
        except asyncio.TimeoutError:
            problem = TimeoutError(errno.ETIMEDOUT, "no connection in time")
        except (OSError, DispatcherError) as error:
            problem = error
        else:
            if not upstream.transport.is_closing():
                if exchange.wants(agent):
                    exchange.connected(upstream)
                else:
                    upstream.transport.close()
                return
            # The process that accepted it ended before it could be used: the request was not sent.
            problem = ConnectionRefusedError("closed as soon as it was open")
        if exchange.wants(agent):
            if not isinstance(problem, (ConnectionRefusedError, FileNotFoundError)):
                self._context.logger.warning("no connection to the agent", agent=agent.name, error=str(problem))
            exchange.unreachable(agent)


async def _open(upstream: Upstream, endpoint: Endpoint, uid: int | None) -> None:
    loop = asyncio.get_running_loop()
    if endpoint.kind == "tcp":
        await loop.create_connection(
            lambda: upstream,  # type: ignore[type-var]
            endpoint.host,
            endpoint.port,
        )
        return
    if endpoint.kind == "vsock":
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await _vsock(loop, sock, (endpoint.cid, endpoint.port))
            await loop.create_unix_connection(lambda: upstream, sock=_as_unix(sock))  # type: ignore[type-var]
        except BaseException:
            sock.close()
            raise
        return
    sock = await _unix(endpoint.path, uid)
    try:
        await loop.create_unix_connection(lambda: upstream, sock=sock)  # type: ignore[type-var]
    except BaseException:
        sock.close()
        raise


async def _unix(path: str, uid: int | None) -> socket.socket:
    for attempt in range(_FULL_TRIES):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with checked_unix_path(path, uid) as checked:
                sock.connect(checked)
        except BlockingIOError:
            sock.close()
            if attempt == _FULL_TRIES - 1:
                break
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        await asyncio.sleep(_FULL_PAUSE)
    raise TimeoutError(errno.ETIMEDOUT, "the listener's queue stays full")


async def _vsock(loop: asyncio.AbstractEventLoop, sock: socket.socket, address: tuple[int, int]) -> None:
    """Connect without blocking; the loop's own `sock_connect` does not support vsock addresses."""
    code = sock.connect_ex(address)
    if code == 0:
        return
    if code != errno.EINPROGRESS:
        raise OSError(code, "vsock connect")
    done: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock, _finish, done)
    try:
        await done
    finally:
        loop.remove_writer(sock)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, "vsock connect")


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _as_unix(sock: socket.socket) -> socket.socket:
    """Return the same connection as an object that the loop takes for a stream: it looks at the family only."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, sock.detach())
