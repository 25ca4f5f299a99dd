"""Stopping and removing a container."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping
from typing import Any

from dispatcher.plugin import Deadline, DeadlineExceeded, Progress, ProviderError
from dispatcher_docker.engine import Engine
from dispatcher_docker.errors import NoSuchObject
from dispatcher_docker.observe import ALIVE, inspect, status


def stop(
    engine: Engine, found: Mapping[str, Any], *, grace: float, deadline: Deadline, progress: Progress
) -> None:
    """Stop a container: send its stop signal and, after `grace` seconds, SIGKILL."""
    container = str(found["Id"])
    if status(found) == "paused":
        # It may have been unpaused, or have ended, meanwhile.
        with contextlib.suppress(ProviderError, NoSuchObject), engine.call("unpause it", deadline) as client:
            client.unpause(container)
    if grace > 0:
        _kill(engine, container, found["Config"].get("StopSignal") or "SIGTERM", deadline)
        if _ended(engine, container, min(grace, deadline.remaining()), deadline, progress, "stopping"):
            return
    _kill(engine, container, "SIGKILL", deadline)
    if not _ended(engine, container, deadline.remaining(), deadline, progress, "stopping by force"):
        raise DeadlineExceeded(
            "The container did not end in time",
            why="SIGKILL does not end it",
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
    pause = 0.01
    while True:
        found = inspect(engine, container, deadline)
        if found is None or status(found) not in ALIVE:
            return True
        if until.expired:
            return False
        progress(step)
        time.sleep(min(pause, max(0.001, until.remaining())))
        pause = min(0.25, pause * 1.5)


def remove(engine: Engine, name: str, deadline: Deadline) -> None:
    """Remove a container, running or not; absent is success."""
    for tries in itertools.count(1):
        try:
            with engine.call("remove the container", deadline) as client:
                client.remove_container(name, force=True, v=True)
            return
        except NoSuchObject:
            return
        except ProviderError as error:
            # Another removal is under way; or Podman learns only now that the container has ended.
            if "in progress" not in error.why and (tries > 2 or "could not be stopped" not in error.why):
                raise
            time.sleep(0.05)
