"""HTTP to the manager over a Unix socket or TLS, with kept-alive connections.  Touches sockets only.

Standard library alone, so that the command line starts fast.  One `Transport` may be used by many threads:
idle connections lie in a small pool, each request has one to itself.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import select
import socket
import ssl as tls
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher.client import trust as target
from dispatcher.plugin.errors import ManagerUnreachable

MAX_ANSWER = 64 * 1024 * 1024  # bytes
MAX_IDLE = 5.0  # seconds; less than the server keeps a connection, so that it is rarely closed under us
POOL = 16
_AGAIN = 0.05  # seconds between two tries to reach a manager that is starting
IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})  # RFC 9110, 9.2.2


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: status, header fields in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class _Idle:
    connection: http.client.HTTPConnection
    since: float = field(default_factory=time.monotonic)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
            target.believe(self.sock, self._path)
        except BaseException:
            self.close()
            raise


class _PinnedConnection(http.client.HTTPSConnection):
    """TLS that believes one certificate, known by its SHA-256, whoever signed it."""

    def __init__(self, host: str, port: int, timeout: float, context: tls.SSLContext, fingerprint: str) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._fingerprint = fingerprint

    def connect(self) -> None:
        super().connect()
        found = hashlib.sha256(self.sock.getpeercert(binary_form=True) or b"").hexdigest()
        if not hmac.compare_digest(found, self._fingerprint):
            self.close()
            raise ManagerUnreachable(
                f"The certificate of {self.host}:{self.port} has another fingerprint",
                why=f"it is {found}, expected was {self._fingerprint}",
                fix="compare with the one the manager logs when it starts; do not go on if they differ",
            )


class Transport:
    """Where the manager is and how to speak to it.  `ManagerClient` describes the parameters.

    :raises BadRequest: a URL, fingerprint, certificate or token that cannot be used.
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
        key_file: str | Path | None = None,
        ssl: bool = True,
        patience: float = 0.0,
    ) -> None:
        self.url = url
        self._patience = patience
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []
        self._headers = {"Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {target.token(token)}"
        self._fingerprint = target.fingerprint(fingerprint) if fingerprint else ""
        self._context: tls.SSLContext | None = None
        self._host, self._port = "", 0
        self._path = target.unix_path(url)
        if self._path:
            return
        self._host, self._port, encrypted = target.tcp(url, ssl)
        if encrypted:
            self._context = target.context(verify and not fingerprint, ca_file, cert_file, key_file)

    def request(self, method: str, path: str, body: bytes | None, timeout: float, *, again: bool = False) -> Reply:
        """Send one request and return its answer.

        :param path: with its query, percent-encoded.
        :param timeout: seconds to wait for the connection and for each piece of the answer.
        :param again: the request may be repeated even though its method is not idempotent.
        :raises ManagerUnreachable: no connection, no answer in time, or a certificate that is not believed.
        """
        headers = self._headers if body is None else self._headers | {"Content-Type": "application/json"}
        while True:
            connection, reused = self._take(timeout)
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                content = response.read(MAX_ANSWER + 1)
            except (http.client.HTTPException, OSError) as error:
                connection.close()
                gone = isinstance(error, (ConnectionError, http.client.RemoteDisconnected))
                if reused and gone and (again or method in IDEMPOTENT):
                    continue
                raise self._unreachable(error) from error
            except BaseException:
                connection.close()
                raise
            if len(content) > MAX_ANSWER:
                connection.close()
                raise ManagerUnreachable(f"{self.url} answers too much", why=f"more than {MAX_ANSWER} bytes")
            if not response.will_close:
                self._give(connection)
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, fields, content)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for entry in idle:
            entry.connection.close()

    def _take(self, timeout: float) -> tuple[http.client.HTTPConnection, bool]:
        while True:
            with self._lock:
                entry = self._idle.pop() if self._idle else None
            if entry is None:
                return self._connect(timeout), False
            sock = entry.connection.sock
            if sock is None or time.monotonic() - entry.since > MAX_IDLE or _readable(sock):
                entry.connection.close()
                continue
            sock.settimeout(timeout)
            return entry.connection, True

    def _give(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < POOL:
                self._idle.append(_Idle(connection))
                return
        connection.close()

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        if self._path:
            connection = _UnixConnection(self._path, timeout)
        elif self._context is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        elif self._fingerprint:
            connection = _PinnedConnection(self._host, self._port, timeout, self._context, self._fingerprint)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=timeout, context=self._context
            )
        until = time.monotonic() + self._patience
        while True:
            try:
                connection.connect()
            except OSError as error:
                connection.close()
                absent = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
                if not (self._patience and self._path and absent and target.is_starting(self._path)):
                    raise self._unreachable(error) from error
                if time.monotonic() > until:
                    what, fix = (
                        f"The manager does not answer at {self.url}",
                        "try again; its log says what it does",
                    )
                    raise ManagerUnreachable(what, why="it is still starting", fix=fix) from error
                time.sleep(_AGAIN)
                continue
            return connection

    def _unreachable(self, error: Exception) -> ManagerUnreachable:
        what, why, fix = f"The manager does not answer at {self.url}", str(error), "is it running? see its log"
        if isinstance(error, tls.SSLCertVerificationError):
            what = f"The certificate of {self.url} is not believed"
            why = error.verify_message.rstrip(".") or str(error)
            fix = "give the fingerprint that the manager logs, or the certificate to trust"
        elif isinstance(error, tls.SSLError):
            why, fix = error.reason or str(error), "is it a TLS port? does it want a client certificate?"
        elif isinstance(error, TimeoutError):
            why, fix = "it took too long", "try again; its log says what it is busy with"
        elif isinstance(error, FileNotFoundError):
            why, fix = "there is no such socket", "start it with `dispatcher serve`, or name it with --manager"
        elif isinstance(error, PermissionError):
            why, fix = "you may not use its socket", "become root or a member of its administrators' group"
        elif isinstance(error, ConnectionRefusedError):
            why, fix = "nobody listens there", "start it with `dispatcher serve`, or name it with --manager"
        elif isinstance(error, socket.gaierror):
            why, fix = f"the host name is not known ({error.strerror})", "check the address"
        elif isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
            why, fix = f"what it answers is no HTTP ({type(error).__name__})", "is it the manager's port?"
        return ManagerUnreachable(what, why=why, fix=fix)


def _readable(sock: socket.socket) -> bool:
    """Whether an idle connection has something to read: the server closed it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(0))


def parse(reply: Reply, url: str) -> dict[str, object]:
    """Return the JSON object of an answer; an empty one when it has no body.

    :raises ManagerUnreachable: it is no JSON object: something else answers there.
    """
    if not reply.body:
        return {}
    try:
        found = json.loads(reply.body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ManagerUnreachable(
            f"Something else than the manager answers at {url}",
            why=f"status {reply.status} without a JSON object",
            fix="check the address",
        )
    return found
