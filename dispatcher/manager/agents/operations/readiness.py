"""Whether an agent is ready: its health check, through its endpoint.

Ready means an HTTP response with a status below 500, not that a process exists.  A Unix socket that the app made
with mode 0600 gets the proxy's group and mode 0660 first, through the descriptor that was checked; only one in the
agent's own directory, and of the agent's user: a provider may name any other.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.manager.agents.agent import Operation
from dispatcher.manager.backends.contained_provider import ContainedProvider
from dispatcher.plugin import endpoints
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DispatcherError, StartFailed, Unavailable
from dispatcher.plugin.model import BackendState, Endpoint, Handle, Observation
from dispatcher.plugin.names import printable

if TYPE_CHECKING:
    from inotify_simple import INotify

RESPONSE_TIME = 10.0  # seconds for one response
SLICE = 0.25  # seconds between checks whether the start was cancelled
OBSERVE_INTERVAL = 1.0  # seconds between observations while the app does not respond
OBSERVE = 10.0  # seconds for an observation
MIN_PAUSE, MAX_PAUSE = 0.001, 0.1  # seconds between tries
MAX_OTHER_FILES = 8  # files that may appear beside an app's socket before the directory is no longer watched
SHARE = 0.2  # of the time that has passed: the most that polling may add to a start

MAX_SHOWN = 5  # addresses in an error
_NOT_YET, _REFUSES = "it does not listen yet", "it refuses connections"
_CLOSES = "it closes the connection without a response"
_NOBODY_LISTENS = (_NOT_YET, _REFUSES, _CLOSES)  # the last one: a port that Docker publishes accepts for the app
_LOOPBACK = ("tcp:127.", "tcp:[::1]")

_thread = threading.local()
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)[ \r]")


class Probe:
    """One app's health check.

    :param path: to GET; :param proxy_gid: group that must be able to connect to Unix sockets; None where the
        proxy is the agents' own user.
    :param directory: the agent's own for sockets; :param uid: its user.
    """

    def __init__(self, path: str, proxy_gid: int | None, directory: Path, uid: int) -> None:
        self._directory = str(directory)
        self._uid = uid
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: dispatcher-health\r\n"
            "Accept: */*\r\nConnection: close\r\n\r\n"
        ).encode()
        self._proxy_gid = proxy_gid

    def __call__(
        self, endpoint: Endpoint, owner_uid: int | None, deadline: Deadline, check: Callable[[], None]
    ) -> str:
        """Return "" when the app is ready, else why it is not yet.

        :param check: called several times a second; an exception ends the wait.
        :raises InsecureEndpoint: the endpoint is not the agent's own.
        """
        if endpoint.kind == "unix" and not os.path.lexists(endpoint.path):  # called very often: be cheap
            return _NOT_YET
        try:
            with self._connect(endpoint, owner_uid) as sock:
                sock.sendall(self._request)
                return self._answer(sock, deadline.bounded(RESPONSE_TIME), check)
        except FileNotFoundError:
            return _NOT_YET
        except ConnectionRefusedError:
            return _REFUSES
        except OSError as error:
            return f"it cannot be reached: {error.strerror or error}"

    def _connect(self, endpoint: Endpoint, owner_uid: int | None) -> socket.socket:
        if endpoint.kind != "unix" or self._proxy_gid is None:
            return endpoints.connect(endpoint, owner_uid, SLICE)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(SLICE)
            with endpoints.checked_unix_path(endpoint.path, owner_uid) as path:
                if os.path.dirname(endpoint.path) == self._directory:
                    self._admit_proxy(path, owner_uid)
                sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return sock

    def _admit_proxy(self, path: str, owner_uid: int | None) -> None:
        """Let the proxy connect to a socket in the agent's directory, if it is the agent's."""
        found = os.stat(path)
        if found.st_uid not in {self._uid, owner_uid} or self._proxy_gid is None:
            return
        if found.st_gid != self._proxy_gid:
            os.chown(path, -1, self._proxy_gid)
        if stat.S_IMODE(found.st_mode) != 0o660:
            os.chmod(path, 0o660)

    def _answer(self, sock: socket.socket, deadline: Deadline, check: Callable[[], None]) -> str:
        head = b""
        while len(head) < 13:
            try:
                block = sock.recv(4096)
            except TimeoutError:
                check()
                if deadline.expired:
                    return "it does not respond"
                continue
            if not block:
                return _CLOSES
            head += block
        status = _STATUS.match(head)
        if status is None:
            return f"invalid HTTP response: {printable(head[:40])}"
        return "" if int(status[1]) < 500 else f"it responds with status {int(status[1])}"


def await_ready(
    provider: ContainedProvider,
    handle: Handle,
    probe: Probe,
    *,
    operation: Operation,
    deadline: Deadline,
    seen: Observation | None = None,
    report: Callable[[Observation], None] | None = None,
) -> Observation:
    """Wait until a running agent is ready; return the last observation.

    The agent is observed regularly: the wait ends when the app has ended, not when the backend does not answer.

    :param seen: a recent observation, if there is one; :param report: is called with each observation.
    :raises StartFailed: the app ended, or was not ready before the deadline.
    :raises Cancelled: the start is no longer wanted.
    :raises DispatcherError: as the provider's `observe`, or `InsecureEndpoint`.
    """
    observed_at, reason = boottime(), _NOT_YET
    with contextlib.closing(PollPacer(operation)) as pauses:
        while True:
            operation.check()
            interval = OBSERVE_INTERVAL if seen and seen.endpoint else MAX_PAUSE
            if seen is None or operation.observe_again or boottime() - observed_at > interval:
                operation.observe_again = False
                seen, observed_at = _observe(provider, handle, deadline, seen), boottime()
            if report and seen:
                report(seen)
            if seen and seen.endpoint:
                reason = probe(seen.endpoint, seen.owner_uid, deadline, operation.check)
                if not reason:
                    return seen
            elif seen:
                reason = seen.detail or "its address is unknown"
            if deadline.expired:
                if seen:  # raises with a better reason if the app ended just now
                    _observe(provider, handle, Deadline(OBSERVE), seen)
                where, fix = "", ""
                if reason in _NOBODY_LISTENS or not (seen and seen.endpoint):
                    where, fix = _elsewhere(provider, handle, seen.endpoint if seen else None)
                raise StartFailed(
                    "The app did not become ready in time",
                    why=reason + where,
                    fix=fix or "read its last lines; `health` and `start_timeout` configure the health check",
                )
            pauses.pause(seen.endpoint if seen else None)


def _elsewhere(provider: ContainedProvider, handle: Handle, expected: Endpoint | None) -> tuple[str, str]:
    """Return where an app listens instead, and what to change; two empty texts where that is unknown."""
    try:
        found = provider.listeners(handle, deadline=Deadline(OBSERVE))
    except DispatcherError:
        return "", ""
    if not found:
        return "", ""
    fix = "let it listen on {socket}, which its command gets" if expected and expected.kind == "unix" else ""
    if not fix:
        fix = "let it listen on the port that {port} stands for"
        if any(address.startswith(_LOOPBACK) for address in found):
            fix += ", and at 0.0.0.0 where it has a network of its own"
    shown = ", ".join(printable(address, 100).strip("'") for address in found[:MAX_SHOWN])
    return f"; it listens at {shown} instead", fix


class PollPacer:
    """The pauses between two tries: until the app's socket appears; then, or without one, growing ones."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._since = boottime()
        self._resources = contextlib.ExitStack()
        self._wait: Callable[[float], bool] | None = None
        self._other_files = 0

    def close(self) -> None:
        """Release the watch."""
        self._resources.close()

    def pause(self, endpoint: Endpoint | None) -> None:
        """Wait a little, or until a file appears in the socket's directory; no longer than `MAX_PAUSE`."""
        if (
            endpoint
            and endpoint.kind == "unix"
            and self._other_files < MAX_OTHER_FILES
            and not os.path.lexists(endpoint.path)
        ):
            self._await_socket(endpoint.path)
        else:
            waited = (boottime() - self._since) * SHARE
            self._operation.wait_for_cancel(min(MAX_PAUSE, max(MIN_PAUSE, waited)))

    def _await_socket(self, path: str) -> None:
        if self._wait is None:
            try:
                self._wait = self._resources.enter_context(watch_directory(os.path.dirname(path)))
            except OSError:
                self._other_files = MAX_OTHER_FILES
                return
            if os.path.lexists(path):  # it appeared just before the watch
                return
        if self._wait(MAX_PAUSE):
            # An agent that fills its directory with files must not keep the manager busy.
            self._other_files += 1
            self._since = boottime()


def _observe(
    provider: ContainedProvider, handle: Handle, deadline: Deadline, before: Observation | None
) -> Observation | None:
    try:
        seen = provider.observe(handle, deadline=deadline.bounded(OBSERVE))
    except Unavailable:
        return before  # a backend that does not answer for a moment says nothing about the agent
    if seen.state in {BackendState.STOPPED, BackendState.ABSENT}:
        raise StartFailed(
            "The app ended before it was ready",
            why=seen.exit_reason or seen.detail or "reason unknown",
            fix="read its last lines",
        )
    return seen


def refuses(endpoint: Endpoint, owner_uid: int | None) -> bool:
    """Whether an endpoint refuses connections; that of a slow or busy app does not."""
    try:
        endpoints.connect(endpoint, owner_uid, 1.0).close()
    except (FileNotFoundError, ConnectionRefusedError, DispatcherError):
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def watch_directory(directory: str) -> Iterator[Callable[[float], bool]]:
    """Watch a directory inside the block; one at a time in each thread.

    Yields a function that waits at most so many seconds and returns whether a file has appeared since its last
    call.  (Polling was a fifth of the CPU time of many starts.)  Each thread keeps its inotify descriptor: closing
    one takes tens of milliseconds.

    :raises OSError: there is no such directory, or the kernel has no watch left for this user.
    """
    from inotify_simple import INotify, flags  # loaded at the first start of an agent, not at the manager's

    kept: _Kept | None = getattr(_thread, "kept", None)
    if kept is None:
        kept = _thread.kept = _Kept(INotify())
    inotify = kept.inotify
    number = inotify.add_watch(directory, flags.CREATE | flags.MOVED_TO | flags.ONLYDIR | flags.DONT_FOLLOW)
    try:
        yield lambda seconds: bool(inotify.read(timeout=int(seconds * 1000)))
    finally:
        inotify.rm_watch(number)
        inotify.read(timeout=0)


class _Kept:
    """The descriptor of a thread, closed when the thread ends."""

    def __init__(self, inotify: INotify) -> None:
        self.inotify = inotify

    def __del__(self) -> None:
        self.inotify.close()
