"""Whether an agent is ready: its health check, through its endpoint.  Touches the endpoint and its socket's mode.

Ready means that an HTTP answer below 500 came back, not that a process exists.  A Unix socket that the app made
for itself alone (0600) is opened to the proxy's group first, by the descriptor that was checked.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from collections.abc import Callable

from dispatcher.manager.agents.agent import Operation
from dispatcher.manager.agents.socket_watch import arrivals
from dispatcher.manager.backends.contained import Guard
from dispatcher.plugin import endpoints
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DispatcherError, StartFailed, Unavailable
from dispatcher.plugin.model import BackendState, Endpoint, Handle, Observation
from dispatcher.plugin.names import printable

ANSWER = 10.0  # seconds that one answer may take
SLICE = 0.25  # seconds between looks at whether the start was cancelled
LOOK = 1.0  # seconds between questions to the backend while the app does not answer
OBSERVE = 10.0  # seconds for the backend's answer
SOONEST, LATEST = 0.001, 0.1  # seconds between tries
FUTILE = 8  # things that may appear beside an app's socket before they are looked at no more
SHARE = 0.2  # of the time that has passed: what waiting may add to a start

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)[ \r]")


class Probe:
    """One app's health check.

    :param path: to GET; :param proxy_gid: group that must be able to connect to Unix sockets; None where the
        proxy is the agents' own user.
    """

    def __init__(self, path: str, proxy_gid: int | None) -> None:
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: dispatcher-health\r\n"
            "Accept: */*\r\nConnection: close\r\n\r\n"
        ).encode()
        self._proxy_gid = proxy_gid

    def __call__(
        self, endpoint: Endpoint, owner_uid: int | None, deadline: Deadline, check: Callable[[], None]
    ) -> str:
        """Return "" when the app is ready, else why it is not yet.

        :param check: called several times a second; what it raises ends the wait.
        :raises InsecureEndpoint: the endpoint is not what the agent may offer.
        """
        if endpoint.kind == "unix" and not os.path.lexists(endpoint.path):  # asked again and again: be cheap
            return "it does not listen yet"
        try:
            with self._connect(endpoint, owner_uid) as sock:
                sock.sendall(self._request)
                return self._answer(sock, deadline.bounded(ANSWER), check)
        except FileNotFoundError:
            return "it does not listen yet"
        except ConnectionRefusedError:
            return "it refuses connections"
        except OSError as error:
            return f"it cannot be reached: {error.strerror or error}"

    def _connect(self, endpoint: Endpoint, owner_uid: int | None) -> socket.socket:
        if endpoint.kind != "unix" or self._proxy_gid is None:
            return endpoints.connect(endpoint, owner_uid, SLICE)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(SLICE)
            with endpoints.checked_unix_path(endpoint.path, owner_uid) as path:
                found = os.stat(path)
                if found.st_gid != self._proxy_gid:
                    os.chown(path, -1, self._proxy_gid)
                if stat.S_IMODE(found.st_mode) != 0o660:
                    os.chmod(path, 0o660)
                sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return sock

    def _answer(self, sock: socket.socket, deadline: Deadline, check: Callable[[], None]) -> str:
        head = b""
        while len(head) < 13:
            try:
                block = sock.recv(4096)
            except TimeoutError:
                check()
                if deadline.expired:
                    return "it does not answer"
                continue
            if not block:
                return "it closes the connection without an answer"
            head += block
        status = _STATUS.match(head)
        if status is None:
            return f"it does not speak HTTP: {printable(head[:40])}"
        return "" if int(status[1]) < 500 else f"it answers with status {int(status[1])}"


def await_ready(
    guard: Guard,
    handle: Handle,
    probe: Probe,
    *,
    operation: Operation,
    deadline: Deadline,
    seen: Observation | None = None,
    tell: Callable[[Observation], None] | None = None,
) -> Observation:
    """Wait until an agent that runs is ready; return how it was observed.

    The backend is asked now and then: an app that ends is not waited for.  One that does not answer is.

    :param seen: a fresh observation, if there is one.
    :param tell: gets what the backend says of an agent before it is asked whether it is ready, each time.
    :raises StartFailed: the app ended, or was not ready before the deadline.
    :raises Cancelled: the start is no longer wanted.
    :raises DispatcherError: as the provider's `observe`, or `InsecureEndpoint`.
    """
    looked, reason = boottime(), "it does not listen yet"
    with contextlib.closing(Pauses(operation)) as pauses:
        while True:
            operation.check()
            if seen is None or operation.nudged or boottime() - looked > (LOOK if seen.endpoint else LATEST):
                operation.nudged = False
                seen, looked = _look(guard, handle, deadline, seen), boottime()
            if tell and seen:
                tell(seen)
            if seen and seen.endpoint:
                reason = probe(seen.endpoint, seen.owner_uid, deadline, operation.check)
                if not reason:
                    return seen
            elif seen:
                reason = seen.detail or "its address is not known yet"
            if deadline.expired:
                if seen:  # an app that ended just now has a better reason
                    _look(guard, handle, Deadline(OBSERVE), seen)
                raise StartFailed(
                    "The app did not become ready in time",
                    why=reason,
                    fix="see its last lines; `health` and `start_timeout` say what is waited for and how long",
                )
            pauses.pause(seen.endpoint if seen else None)


class Pauses:
    """How long to wait between two tries: until the app's socket appears; then, or without one, ever longer."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._since = boottime()
        self._kept = contextlib.ExitStack()
        self._arrived: Callable[[float], bool] | None = None
        self._futile = 0

    def close(self) -> None:
        """Release what is held."""
        self._kept.close()

    def pause(self, endpoint: Endpoint | None) -> None:
        """Wait a little, or until there is a reason to try again; no longer than `LATEST`."""
        if endpoint and endpoint.kind == "unix" and self._futile < FUTILE and not os.path.lexists(endpoint.path):
            self._await_socket(endpoint.path)
        else:
            waited = (boottime() - self._since) * SHARE
            self._operation.cancel.wait(min(LATEST, max(SOONEST, waited)))

    def _await_socket(self, path: str) -> None:
        if self._arrived is None:
            try:
                self._arrived = self._kept.enter_context(arrivals(os.path.dirname(path)))
            except OSError:
                self._futile = FUTILE
                return
            if os.path.lexists(path):  # it came just before the watch
                return
        if self._arrived(LATEST):
            # An agent may fill its directory with anything: it must not keep the manager busy by that.
            self._futile += 1
            self._since = boottime()


def _look(guard: Guard, handle: Handle, deadline: Deadline, before: Observation | None) -> Observation | None:
    try:
        seen = guard.observe(handle, deadline=deadline.bounded(OBSERVE))
    except Unavailable:
        return before  # a backend that is away for a moment says nothing about the agent
    if seen.state in {BackendState.STOPPED, BackendState.ABSENT}:
        raise StartFailed(
            "The app ended before it was ready",
            why=seen.exit_reason or seen.detail or "nobody knows why",
            fix="see its last lines",
        )
    return seen


def refuses(endpoint: Endpoint, owner_uid: int | None) -> bool:
    """Whether nobody listens at an endpoint; a slow or busy app does not refuse."""
    try:
        endpoints.connect(endpoint, owner_uid, 1.0).close()
    except (FileNotFoundError, ConnectionRefusedError, DispatcherError):
        return True
    except OSError:
        return False
    return False
