"""A container's output, as lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from dispatcher.plugin import MAX_LINE, Deadline, DeadlineExceeded, DispatcherError, ProviderError, Unavailable
from dispatcher_docker.engine import Engine
from dispatcher_docker.errors import NoSuchObject, translated


def read(engine: Engine, name: str, *, tail: int, deadline: Deadline) -> list[bytes]:
    """Return the last `tail` lines; none if the container does not exist."""
    try:
        with engine.call("read the log", deadline) as client:
            found: Any = client.logs(name, stdout=True, stderr=True, tail=max(0, tail))
    except NoSuchObject:
        return []
    except ProviderError as error:
        if "marked for removal" in error.why:
            return []
        raise
    return list(lines([found]))[-tail:] if tail > 0 else []


def follow(engine: Engine, name: str, *, tail: int, deadline: Deadline) -> Iterator[bytes]:
    """Yield the last `tail` lines, then new ones until the deadline or the container's end."""
    began = time.time()
    later = Deadline(deadline.remaining() + 30)  # the stream is closed at the deadline, before this timeout
    try:
        with engine.call("read the log", deadline) as client:
            # Podman begins where the log ends when it has opened it, later than the request.
            wanted: Any = {"since": began} if engine.is_podman and tail <= 0 else {"tail": max(0, tail)}
            stream: Any = client.logs(name, stdout=True, stderr=True, stream=True, follow=True, **wanted)
    except NoSuchObject:
        return
    except DeadlineExceeded:
        if engine.is_podman:  # it answers with the first line, and there was none
            return
        raise
    timer = threading.Timer(deadline.remaining(), _close, (stream,))
    timer.daemon = True
    timer.start()
    try:
        with translated("read the log", engine.url, later, engine.name):
            yield from lines(stream)
    except Unavailable:
        if not deadline.expired:
            raise
    finally:
        timer.cancel()
        _close(stream)


def _close(stream: Any) -> None:
    try:
        stream.close()
    except (OSError, AttributeError, DispatcherError):
        pass  # closed already


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split chunks of any size into lines of at most `MAX_LINE`; the rest of a longer line is dropped."""
    rest, cut = b"", False
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if not cut:
                yield line[:MAX_LINE]
            cut = False
        if len(rest) > MAX_LINE:
            if not cut:
                yield rest[:MAX_LINE]
            rest, cut = b"", True
        elif cut:
            rest = b""
    if rest and not cut:
        yield rest
