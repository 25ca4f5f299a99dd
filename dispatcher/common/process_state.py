"""State of the whole process that a library may change when it is imported: noted, compared and set back.

Only what would harm everything else in silence: the way to the log, modes of new files, limits, and so on.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

_LOGGERS = ("", "dispatcher")  # "": the root
_LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]
_STANDARD = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the state: how it is read, and set."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


def _umask() -> int:
    with open("/proc/self/status", "rb") as status:  # os.umask would change it meanwhile
        return next(int(line.split()[1], 8) for line in status if line.startswith(b"Umask:"))


def _logger(name: str) -> _Part:
    logger = logging.getLogger(name)

    def read() -> tuple[Any, ...]:
        return list(logger.handlers), list(logger.filters), logger.level, logger.disabled, logger.propagate

    def write(value: tuple[Any, ...]) -> None:
        logger.handlers[:], logger.filters[:], level, logger.disabled, logger.propagate = value
        logger.setLevel(level)

    return _Part(read, write)


def _limit(name: str) -> _Part:
    number = getattr(resource, name)
    return _Part(lambda: resource.getrlimit(number), lambda value: resource.setrlimit(number, value))


def _streams() -> tuple[Any, ...]:
    return sys.stdin, sys.stdout, sys.stderr


def _set_streams(value: tuple[Any, ...]) -> None:
    sys.stdin, sys.stdout, sys.stderr = value


def _disable(level: int) -> None:
    logging.disable(level)


def _event_loops() -> Any:
    """The policy of asyncio; None is the default, which `asyncio.get_event_loop_policy` would make."""
    return getattr(sys.modules.get("asyncio.events"), "_event_loop_policy", None)


def _set_event_loops(policy: Any) -> None:
    sys.modules["asyncio.events"].set_event_loop_policy(policy)


_PARTS = {
    "the event loops of asyncio": _Part(_event_loops, _set_event_loops),
    "the standard streams": _Part(_streams, _set_streams),
    "the umask": _Part(_umask, os.umask),
    "the working directory": _Part(os.getcwd, os.chdir),
    "the level below which nothing is logged": _Part(lambda: logging.root.manager.disable, _disable),
    **{f"the log {name or 'of all modules'}": _logger(name) for name in _LOGGERS},
    "the trace of threads": _Part(threading.gettrace, threading.settrace),
    "the profile of threads": _Part(threading.getprofile, threading.setprofile),
    "the recursion limit": _Part(sys.getrecursionlimit, sys.setrecursionlimit),
    "the time-out of sockets": _Part(socket.getdefaulttimeout, socket.setdefaulttimeout),
    **{f"the limit {name}": _limit(name) for name in _LIMITS},
}


@contextmanager
def unchanged() -> Iterator[list[str]]:
    """Set back at the end what the block changes; yield a list that then has the names of these parts."""
    before, changed = _snapshot(), list[str]()
    try:
        with _standard_descriptors(changed):
            yield changed
    finally:
        for name, value in before.items():
            part = _PARTS[name]
            with suppress(OSError, ValueError):
                if part.read() == value:
                    continue
            try:
                part.write(value)
                changed.append(name)
            except (OSError, ValueError):  # only root may raise a hard limit
                changed.append(f"{name} (which cannot be set back)")


def _snapshot() -> dict[str, Any]:
    found = {}
    for name, part in _PARTS.items():
        with suppress(OSError, ValueError):
            found[name] = part.read()
    return found


@contextmanager
def _standard_descriptors(changed: list[str]) -> Iterator[None]:
    """Keep standard input, output and error: a file with such a number would get the output."""
    kept = {}
    for number in _STANDARD:
        with suppress(OSError):
            kept[number] = os.dup(number)
    try:
        yield
    finally:
        for number, copy in kept.items():
            with suppress(OSError):
                if not _is_same(number, copy):
                    changed.append(f"descriptor {number}")
                    os.dup2(copy, number)
            with suppress(OSError):
                os.close(copy)


def _is_same(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False
