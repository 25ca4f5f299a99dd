"""Cheroot, adapted to the manager: listening sockets are passed in, threads are started on demand, and TLS
handshakes run outside of the accepting thread.

This is the only module that uses cheroot's internals.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from cheroot import connections, server, wsgi
from cheroot.makefile import StreamReader, StreamWriter
from cheroot.workers import threadpool

from dispatcher.common import problem
from dispatcher.common.ip_limits import Tally
from dispatcher.common.log import logger

BACKLOG = 256
MAX_CONNECTIONS = 1000  # of one listener, idle ones included
MAX_OF_ADDRESS = 250  # of them from one address
MAX_HEAD = 32768  # bytes
MAX_BODY = 1024 * 1024  # bytes; the application's own limit is lower, and its error says more
TIMEOUT = 10  # seconds for the next piece of a handshake or a request, or for the next request
PATIENCE = 20.0  # seconds for a whole handshake and request of a client that has not shown a credential
THREAD_IDLE = 20.0  # seconds after which a spare thread ends
LEAST_THREADS = 2
STOP_TIMEOUT = 3  # seconds for requests in flight when the manager ends

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

_threads: Any = threadpool  # cheroot's threads are not typed
_log = logger("manager.http")


class ThreadPool:
    """Worker threads, started on demand up to `most`, ended when idle.

    In place of cheroot's own pool, whose count of idle threads is a guess: a request could be queued behind one
    that waits for an agent.
    """

    def __init__(self, http_server: Server, least: int, most: int) -> None:
        self._server = http_server
        self._least = min(least, most)
        self._most = most
        self._work: deque[Any] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._stopping = False
        self._changed = threading.Condition()

    @property
    def idle(self) -> int:
        """Threads that wait for work."""
        return self._idle

    @property
    def qsize(self) -> int:
        """Connections that wait for a thread."""
        return len(self._work)

    def start(self) -> None:
        """Start the smallest number of threads."""
        with self._changed:
            for _ in range(self._least):
                self._spawn()

    def put(self, connection: Any) -> None:
        """Queue a connection whose next request has arrived."""
        with self._changed:
            self._work.append(connection)
            if len(self._work) > self._idle and len(self._threads) < self._most:
                self._spawn()
            self._changed.notify()

    def get(self) -> Any:
        """Return the next connection, or cheroot's shutdown request; called by the threads."""
        with self._changed:
            self._idle += 1
            try:
                while not self._work:
                    if self._stopping:
                        return self._end()
                    if not self._changed.wait(THREAD_IDLE) and not self._work and self._spare():
                        return self._end()
                return self._work.popleft()
            finally:
                self._idle -= 1

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Wait until threads have finished their requests, for `timeout` seconds at most."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            threads = list(self._threads)
        end = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _spawn(self) -> None:
        thread: threading.Thread = _threads.WorkerThread(self._server)
        thread.daemon = True
        self._threads.add(thread)
        thread.start()

    def _spare(self) -> bool:
        return len(self._threads) > self._least

    def _end(self) -> Any:
        thread = threading.current_thread()
        self._threads.discard(thread)
        self._server.stats["Worker Threads"].pop(thread.name, None)
        return _threads._SHUTDOWNREQUEST  # noqa: SLF001 - what ends cheroot's threads


class Request(server.HTTPRequest):
    """A request; errors from cheroot itself are problem documents, too."""

    def respond(self) -> None:
        """Answer.  A length that is not a plain number is refused: for -1 cheroot would read until the end."""
        length = self.inheaders.get(b"Content-Length")
        if length is not None and not length.isdigit():
            self.simple_response("400 Bad Request", "Malformed Content-Length header.")
        else:
            super().respond()

    def simple_response(self, status: object, msg: str = "") -> None:
        number, _, title = str(status).partition(" ")
        data = json.dumps(problem.document(int(number), title, msg)).encode()
        head = (
            f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\nContent-Type: {problem.MEDIA_TYPE}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.conn.wfile.write(head.encode("latin-1") + data)


class Connection(server.HTTPConnection):
    """A connection without TLS."""

    RequestHandlerClass = Request


class TlsConnection(Connection):
    """A connection whose handshake runs in the thread that handles its first request.

    Any host can connect.  Until a credential is shown the time for a whole request is bounded: otherwise a few
    clients that send byte by byte could occupy every thread.
    """

    requests_handled = 0

    def communicate(self) -> bool:
        self.server.watch(self)
        try:
            return self._communicate()
        finally:
            self.server.trust(self)

    def close(self) -> None:
        """Close, and release the connection's place in the limit of its address."""
        self.server.forget(self)
        super().close()

    def _communicate(self) -> bool:
        if self.requests_handled == 0:
            try:
                self.socket.do_handshake()
                self.ssl_env = {
                    "wsgi.url_scheme": "https",
                    # With a certificate that is not signed by `client_ca` the handshake has failed.
                    "dispatcher.certified": bool(self.socket.getpeercert()),
                    "dispatcher.trust": lambda: self.server.trust(self),
                }
            except (OSError, ValueError) as error:
                _log.info("a TLS handshake failed", address=self.remote_addr, why=str(error))
                return False
        self.requests_handled += 1
        return bool(super().communicate())  # type: ignore[no-untyped-call]


class Connections(connections.ConnectionManager):
    """The idle connections; its timer also closes connections that exceed `PATIENCE`."""

    def _expire(self, threshold: float) -> None:
        super()._expire(threshold)  # type: ignore[misc]  # not among what cheroot types
        self.server.cut_off()


class TlsAdapter:
    """Wraps accepted sockets, with the interface that cheroot expects.

    :ivar context: may be replaced while serving: new connections use the new one.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def wrap(self, sock: socket.socket) -> tuple[ssl.SSLSocket, dict[str, Any]]:
        """Return the wrapped socket, before its handshake."""
        return self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), {}

    @staticmethod
    def makefile(sock: socket.socket, mode: str = "r", bufsize: int = -1) -> Any:
        """Return a file for reading or writing."""
        return (StreamReader if "r" in mode else StreamWriter)(sock, mode, bufsize)


class Server(wsgi.Server):
    """Serves one WSGI application on one listening socket.

    :param sock: bound; :param threads: at most.
    """

    def __init__(
        self, sock: socket.socket, app: WsgiApp, threads: int, context: ssl.SSLContext | None = None
    ) -> None:
        unix = sock.family == socket.AF_UNIX
        address = sock.getsockname() if unix else sock.getsockname()[:2]
        super().__init__(address, app, 1, server_name="dispatcher", timeout=TIMEOUT, peercreds_enabled=unix, max=1)
        self.requests = ThreadPool(self, LEAST_THREADS, threads)
        self.ConnectionClass = TlsConnection if context else Connection
        self.ssl_adapter = TlsAdapter(context) if context else None
        self.max_request_header_size = MAX_HEAD
        self.max_request_body_size = MAX_BODY
        self.keep_alive_conn_limit = MAX_CONNECTIONS
        self.shutdown_timeout = STOP_TIMEOUT
        self.expiration_interval = 2.0
        self._bound = sock
        self._watched: dict[TlsConnection, float] = {}
        self._addresses = Tally()
        self._counted: dict[TlsConnection, str] = {}
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Listen.  Replaces cheroot's own method, which makes a socket, or takes descriptor 3 under systemd."""
        self._interrupt = None
        self.software = self.server_name
        self.socket = self._bound
        self.socket.settimeout(1)
        self.socket.listen(BACKLOG)
        self._connections = Connections(self)
        self.requests.start()
        self.ready = True
        self._start_time = time.time()

    def process_conn(self, conn: Any) -> None:
        """Queue a connection that has data for a thread; keep a new one until it has."""
        if not self.ready:
            conn.close()
        elif conn.last_used is not None:
            self.requests.put(conn)
        elif self.can_add_keepalive_connection and self._count(conn):
            self.put_conn(conn)
        else:
            _log.warning("too many connections", most=MAX_CONNECTIONS, address=conn.remote_addr)
            conn.close()

    # Limits for clients that have not shown a credential

    def _count(self, conn: Any) -> bool:
        """Count a new connection of an address; False when the address has too many."""
        if not isinstance(conn, TlsConnection):
            return True
        with self._lock:
            address = self._counted[conn] = conn.remote_addr or ""
            return self._addresses.add(address) <= MAX_OF_ADDRESS

    def forget(self, conn: TlsConnection) -> None:
        """Note that a connection is closed."""
        with self._lock:
            address = self._counted.pop(conn, None)
            if address is not None:
                self._addresses.drop(address)

    def watch(self, conn: TlsConnection) -> None:
        """Begin the time limit of a request; `trust` ends it."""
        self._watched[conn] = time.monotonic() + PATIENCE

    def trust(self, conn: TlsConnection) -> None:
        """End the time limit: a credential was shown, or the request is over."""
        self._watched.pop(conn, None)

    def cut_off(self) -> None:
        """Close the connections whose time limit is over."""
        now = time.monotonic()
        for conn, until in list(self._watched.items()):
            if until < now:
                _log.info("a connection sent no request in time", address=conn.remote_addr, seconds=PATIENCE)
                with contextlib.suppress(OSError):  # not SSLSocket's method: another thread is using it
                    socket.socket.shutdown(conn.socket, socket.SHUT_RDWR)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        """Log messages of cheroot; closed connections only at the level debug."""
        if level <= logging.INFO:
            _log.debug(msg)
        else:
            _log.log(level, msg, exc_info=traceback)

    def serve_in_thread(self) -> threading.Thread:
        """Listen, and serve in a new thread."""
        self.prepare()
        thread = threading.Thread(target=self.serve, name="dispatcher-accept", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Stop serving; requests in flight have `STOP_TIMEOUT` to finish."""
        stopper = threading.Thread(target=self.stop, daemon=True)
        stopper.start()
        while stopper.is_alive() and self.socket is not None:
            self._wake_accept_thread()
            stopper.join(0.02)
        stopper.join()

    def _wake_accept_thread(self) -> None:
        """Connect to the own socket, so that the accepting thread returns from its poll."""
        with contextlib.suppress(OSError), socket.socket(self._bound.family) as sock:
            sock.settimeout(0.2)
            sock.connect(self._bound.getsockname())
