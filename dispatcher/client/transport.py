"""HTTP requests to the manager, over a Unix socket or TLS: urllib3 with this project's errors.

One `Transport` may be used by many threads: urllib3 pools the connections.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, InsecureRequestWarning, NewConnectionError, SSLError
from urllib3.response import BaseHTTPResponse

from dispatcher.client import trust
from dispatcher.common.tls import client_context
from dispatcher.plugin.errors import ManagerUnreachable

MAX_ANSWER = 64 * 1024 * 1024  # bytes
MAX_IDLE = 5.0  # seconds; shorter than the server's limit, so that a request rarely meets a closing connection
IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})  # RFC 9110, 9.2.2
MAX_UNIX_PATH = 107  # bytes, unix(7)
_POOL = 100  # more than the portal has threads
_RETRY_INTERVAL = 0.05  # seconds between two attempts to reach a manager that is starting


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: status, body, and the field ``Retry-After`` ("" without one)."""

    status: int
    body: bytes
    retry_after: str


class _Current(threading.local):
    """What the current thread's request uses.

    :ivar opened: how many connections it has opened: whether the request went over a kept one.
    """

    opened = 0
    connection: HTTPConnection | None = None


_current = _Current()


class _Connection(HTTPConnection):
    """A connection that counts as closed after a while without use."""

    _answered = 0.0

    def connect(self) -> None:
        _current.opened += 1
        super().connect()

    def request(self, *args: Any, **options: Any) -> None:
        _current.connection = self
        super().request(*args, **options)

    @property
    def is_connected(self) -> bool:
        return super().is_connected and time.monotonic() - self._answered < MAX_IDLE

    def getresponse(self) -> Any:
        response = super().getresponse()
        self._answered = time.monotonic()
        return response


class _TlsConnection(_Connection, HTTPSConnection):
    """The same with TLS."""


class _UnixConnection(_Connection):
    """The same over the Unix socket at `path`."""

    def __init__(self, host: str, *, path: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._path = path

    def _new_conn(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self._path)
            trust.check_peer(sock, self._path)
        except OSError as error:
            sock.close()
            raise NewConnectionError(self, str(error)) from error
        except ManagerUnreachable:
            sock.close()
            raise
        return sock


class Transport:
    """Sends requests to one manager.

    :param url: ``unix:///PATH`` of a socket, or ``https://HOST[:4443]``; ``http://`` only with ``ssl=False``
        and a loopback address.
    :param token: authenticates the caller over TCP.
    :param verify: False accepts any certificate (``-k``): the connection is encrypted and not authenticated.
    :param fingerprint: SHA-256, in hexadecimal, of the certificate to trust, with any issuer.
    :param ca_file: PEM file of the certificates to trust instead of the system's.
    :param cert_file: PEM file of the client's own certificate and its key.
    :param patience: seconds to wait for a manager that is starting on this machine.
    :param whole: seconds beyond a request's timeout for its whole answer, however slow; None: no limit.
    :raises BadRequest: a parameter cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        verify: bool = True,
        fingerprint: str | None = None,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        ssl: bool = True,
        patience: float = 0.0,
        whole: float | None = None,
    ) -> None:
        self.url = url
        self._whole = whole
        self._patience = patience
        self._headers = {"Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {trust.token(token)}"
        pinned = trust.fingerprint(fingerprint) if fingerprint else None
        self._path = trust.unix_path(url)
        host, port, encrypted = ("localhost", None, False) if self._path else trust.tcp(url, ssl)
        if encrypted:
            if not (verify or pinned):
                warnings.simplefilter("ignore", InsecureRequestWarning)  # asked for; the caller says what it means
            context = client_context(verify=verify and not pinned, ca_file=ca_file, cert_file=cert_file)
            self._pool: HTTPConnectionPool = HTTPSConnectionPool(
                host, port, maxsize=_POOL, ssl_context=context, assert_fingerprint=pinned
            )
            self._pool.ConnectionCls = _TlsConnection
        elif self._path:
            self._pool = HTTPConnectionPool(host, maxsize=_POOL, path=self._path)
            self._pool.ConnectionCls = _UnixConnection
        else:
            self._pool = HTTPConnectionPool(host, port, maxsize=_POOL)
            self._pool.ConnectionCls = _Connection

    def request(self, method: str, path: str, body: bytes | None, timeout: float, *, again: bool = False) -> Reply:
        """Send one request and return its answer.

        :param path: with its query, percent-encoded.
        :param timeout: seconds to wait for the connection and for each piece of the answer.
        :param again: the request may be repeated even though its method is not idempotent.
        :raises ManagerUnreachable: no connection, no answer in time, or a certificate that is not trusted.
        """
        repeatable = again or method in IDEMPOTENT
        until = time.monotonic() + self._patience
        while True:
            opened = _current.opened
            try:
                with self._limited(timeout):
                    return self._exchange(method, path, body, timeout)
            except (HTTPError, OSError, HTTPException) as error:
                cause = _cause(error)
                if isinstance(error, NewConnectionError):
                    if not self._is_starting(cause):
                        raise self._unreachable(cause) from error
                    if time.monotonic() > until:
                        raise ManagerUnreachable(
                            f"The manager does not answer at {self.url}",
                            why="it is still starting",
                            fix="try again; its log shows the progress",
                        ) from error
                    time.sleep(_RETRY_INTERVAL)
                elif repeatable and isinstance(cause, ConnectionError) and _current.opened == opened:
                    repeatable = False  # the server closed a kept connection just as the request was sent
                else:
                    raise self._unreachable(cause) from error

    def close(self) -> None:
        """Close all connections.  The transport cannot be used any more."""
        self._pool.close()

    @contextmanager
    def _limited(self, timeout: float) -> Iterator[None]:
        """Limit the time of the block, which sends a request: its connection is closed when it is over.

        :raises TimeoutError: it is over.
        """
        if self._whole is None:
            yield
            return
        expired = threading.Event()
        current = vars(_current)  # of this thread

        def close() -> None:
            expired.set()
            connection = current.get("connection")
            if connection is not None and connection.sock is not None:
                with suppress(OSError):  # not SSLSocket's method: another thread is using it
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

        timer = threading.Timer(timeout + self._whole, close)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (HTTPError, OSError, HTTPException) as error:
            if expired.is_set():
                raise TimeoutError from error
            raise
        finally:
            timer.cancel()
            _current.connection = None

    def _exchange(self, method: str, path: str, body: bytes | None, timeout: float) -> Reply:
        headers = self._headers if body is None else self._headers | {"Content-Type": "application/json"}
        response: BaseHTTPResponse = self._pool.urlopen(
            method, path, body, headers, retries=False, redirect=False, timeout=timeout, preload_content=False
        )
        try:
            content = response.read(MAX_ANSWER + 1, decode_content=False)
            if len(content) > MAX_ANSWER:
                raise ManagerUnreachable(
                    f"The answer of {self.url} is too long", why=f"more than {MAX_ANSWER} bytes"
                )
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return Reply(response.status, content, response.headers.get("Retry-After", ""))

    def _is_starting(self, cause: BaseException) -> bool:
        return (
            bool(self._patience and self._path)
            and isinstance(cause, (FileNotFoundError, ConnectionRefusedError))
            and trust.is_starting(self._path)
        )

    def _unreachable(self, cause: BaseException) -> ManagerUnreachable:
        what, why, fix = f"The manager does not answer at {self.url}", str(cause), "is it running? see its log"
        if isinstance(cause, ssl.SSLCertVerificationError):
            what = f"The certificate of {self.url} is not trusted"
            why = cause.verify_message.rstrip(".") or str(cause)
            fix = "give the fingerprint that the manager logs (--fingerprint), or its certificate (--sslcert)"
        elif isinstance(cause, SSLError) and "ingerprint" in str(cause):
            what = f"The certificate of {self.url} has another fingerprint"
            fix = "compare with the one that the manager logs when it starts; do not go on if they differ"
        elif isinstance(cause, ssl.SSLError):
            why, fix = cause.reason or str(cause), "is it a TLS port? does it want a client certificate?"
        elif isinstance(cause, TimeoutError):
            why, fix = "timed out", "try again; its log shows what it is busy with"
        elif isinstance(cause, FileNotFoundError):
            why, fix = "the socket does not exist", trust.how_to_start()
        elif isinstance(cause, PermissionError):
            why, fix = "no permission for its socket", trust.how_to_be_allowed(self._path)
        elif isinstance(cause, OSError) and len(os.fsencode(self._path)) > MAX_UNIX_PATH:
            why, fix = (
                f"the path of a Unix socket has at most {MAX_UNIX_PATH} bytes",
                "make a link with a shorter path",
            )
        elif isinstance(cause, ConnectionRefusedError):
            why, fix = "connection refused", trust.how_to_start()
        elif isinstance(cause, socket.gaierror):
            why, fix = f"unknown host name ({cause.strerror})", "check the address"
        elif isinstance(cause, HTTPException) and not isinstance(cause, ConnectionError):
            why, fix = f"invalid HTTP response ({type(cause).__name__})", "is it the manager's port?"
        return ManagerUnreachable(what, why=why, fix=fix)


def _cause(error: BaseException) -> BaseException:
    """Return the standard library's exception below one of urllib3, or the last of urllib3 itself."""
    while isinstance(error, HTTPError):
        below = error.__cause__ or error.__context__
        if below is None:
            return error
        error = below
    return error


class Answer(dict[str, Any]):
    """A JSON object of an answer; a member that is missing is an error of the manager's, not of this program's."""

    def __missing__(self, key: str) -> Any:
        raise not_understood(f"a member {key!r} is missing")


def not_understood(why: str) -> ManagerUnreachable:
    """Return the error about an answer that has another form than expected."""
    return ManagerUnreachable(
        "The answer of the manager is not understood",
        why=why,
        fix="check that it is a manager, of the same version as this program",
    )


def parse(reply: Reply, url: str) -> Answer:
    """Return the JSON object of an answer; an empty one when it has no body.

    :raises ManagerUnreachable: it is not a JSON object: another program answers there.
    """
    if not reply.body:
        return Answer()
    try:
        found = json.loads(reply.body.decode(), object_hook=Answer)  # UTF-8 alone (RFC 8259)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Answer):
        raise ManagerUnreachable(
            f"Another program than the manager answers at {url}",
            why=f"status {reply.status} without a JSON object",
            fix="check the address",
        )
    return found
