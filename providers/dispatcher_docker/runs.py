"""The life of one container: found, made, started, ended, removed.  Touches the engine.

Each function is a few requests; what they mean for an agent is `provider`'s business.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dispatcher.plugin import Deadline, DeadlineExceeded, DispatcherError, Progress, ProviderError
from dispatcher_docker.engine import Client, Engine
from dispatcher_docker.translate import NameTaken, NoSuchObject

ALIVE = {"running", "paused", "restarting"}


def inspect(engine: Engine, name: str, deadline: Deadline) -> Mapping[str, Any] | None:
    """Return the engine's inspection of a container, None if there is none."""
    try:
        with engine.call("look for the container", deadline) as client:
            found: Mapping[str, Any] = client.inspect_container(name)
            return found
    except NoSuchObject:
        return None


def status(found: Mapping[str, Any]) -> str:
    """Return the engine's word for a container's state."""
    return str(found["State"].get("Status", ""))


def create(engine: Engine, body: dict[str, Any], name: str, platform: str, deadline: Deadline) -> str:
    """Create a container; return its id."""
    with engine.call("create the container", deadline) as client:
        return client.make(body, name, platform)


def start(engine: Engine, container: str, stdin: bytes | None, deadline: Deadline) -> None:
    """Start a container; hand it its standard input, then the input's end."""
    with engine.call("start the container", deadline) as client:
        if stdin is None:
            client.start(container)
            return
        with _attached(client, container) as sock:
            client.start(container)
            sock.settimeout(max(0.1, deadline.remaining()))
            sock.sendall(stdin)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                sock.settimeout(min(2.0, max(0.1, deadline.remaining())))
                while sock.recv(4096):
                    pass  # the engine hangs up once it has passed everything on


@contextlib.contextmanager
def _attached(client: Client, container: str) -> Iterator[socket.socket]:
    stream = client.attach_socket(container, params={"stdin": 1, "stream": 1})
    try:
        yield getattr(stream, "_sock", stream)
    finally:
        response = getattr(stream, "_response", None)
        with contextlib.suppress(ValueError, OSError):  # the engine has hung up, and its end is closed already
            if response is not None:
                response.close()
            stream.close()


def pause(engine: Engine, name: str, deadline: Deadline) -> None:
    """Freeze a container."""
    with engine.call("pause the container", deadline) as client:
        client.pause(name)


def unpause(engine: Engine, name: str, deadline: Deadline) -> None:
    """Thaw a container."""
    with engine.call("unpause the container", deadline) as client:
        client.unpause(name)


def end(engine: Engine, found: Mapping[str, Any], *, grace: float, deadline: Deadline, progress: Progress) -> None:
    """End a container that lives: its stop signal, `grace` seconds, then by force."""
    container = str(found["Id"])
    if status(found) == "paused":
        with contextlib.suppress(ProviderError, NoSuchObject):  # woken or ended meanwhile
            unpause(engine, container, deadline)
    if grace > 0:
        _kill(engine, container, found["Config"].get("StopSignal") or "SIGTERM", deadline)
        if _ended(engine, container, min(grace, deadline.remaining()), deadline, progress, "stopping"):
            return
    _kill(engine, container, "SIGKILL", deadline)
    if not _ended(engine, container, deadline.remaining(), deadline, progress, "stopping by force"):
        raise DeadlineExceeded(
            "The container did not end in time",
            why="it does not even end when it is killed",
            fix="look for processes in uninterruptible sleep on the engine's host",
        )


def _kill(engine: Engine, container: str, signal: str, deadline: Deadline) -> None:
    try:
        with engine.call("signal the container", deadline) as client:
            client.kill(container, signal)
    except NoSuchObject:
        return
    except ProviderError:
        found = inspect(engine, container, deadline)
        if found and status(found) in ALIVE:
            raise


def _ended(
    engine: Engine, container: str, seconds: float, deadline: Deadline, progress: Progress, step: str
) -> bool:
    until = Deadline(seconds)
    nap = 0.01
    while True:
        found = inspect(engine, container, deadline)
        if found is None or status(found) not in ALIVE:
            return True
        if until.expired:
            return False
        progress(step)
        time.sleep(min(nap, max(0.001, until.remaining())))
        nap = min(0.25, nap * 1.5)


def remove(engine: Engine, name: str, deadline: Deadline) -> None:
    """Remove a container, killed if need be; none is success."""
    while True:
        try:
            with engine.call("remove the container", deadline) as client:
                client.remove_container(name, force=True, v=True)
            return
        except NoSuchObject:
            return
        except ProviderError as error:
            if "in progress" not in error.why:
                raise
            time.sleep(0.05)  # somebody else removes it: wait for that


def clean_up(engine: Engine, name: str) -> None:
    """Remove what a start that failed has made; the engine may be gone, then the next start does it."""
    with contextlib.suppress(DispatcherError):
        remove(engine, name, Deadline(10))


__all__ = [
    "ALIVE",
    "NameTaken",
    "clean_up",
    "create",
    "end",
    "inspect",
    "pause",
    "remove",
    "start",
    "status",
    "unpause",
]
