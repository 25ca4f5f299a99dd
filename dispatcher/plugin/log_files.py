"""Reads log files that another process writes and rotates."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError

MAX_LINE = 64 * 1024  # bytes of a line; a longer one is passed on in pieces
_PAUSE = 0.2  # seconds between checks for new output


def read_lines(path: Path, *, newest: int = 1, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
    """Yield the last `tail` lines of a log, in rotated files too, then with `follow` new ones until the deadline.

    :param newest: number of the newest rotated file: ``NAME.0`` or ``NAME.1``.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(path))
        text, number = file.read(), newest
        while text.count(b"\n") <= tail and os.path.lexists(older := Path(f"{path}.{number}")):
            with _open(older) as rotated:
                text, number = rotated.read() + text, number + 1
        *whole, rest = text.split(b"\n")
        if rest and not follow:
            whole.append(rest)
        if tail > 0:
            yield from [piece for line in whole[-tail:] for piece in _pieces(line)][-tail:]
        while follow and not deadline.expired:
            block = file.read(MAX_LINE)
            new = None if block else _open(path)
            if new and not os.path.sameopenfile(new.fileno(), file.fileno()):
                block = file.read()  # written between the last read and the rotation
                file = stack.enter_context(new)
            elif new:
                if os.fstat(new.fileno()).st_size < file.tell():  # truncated by hand
                    file.seek(0)
                new.close()
                time.sleep(min(_PAUSE, deadline.remaining()))
            *whole, rest = (rest + block).split(b"\n")
            if len(rest) >= MAX_LINE:
                whole, rest = [*whole, rest], b""
            for line in whole:
                yield from _pieces(line)
        if follow and rest:
            yield from _pieces(rest)


def remove_logs(path: Path) -> None:
    """Remove a log and its rotated files; absent is success.

    For `destroy` with ``data=True``; the core removes the log directory when it removes the agent.

    :raises ProviderError: a file cannot be removed.
    """
    try:
        for file in (path, *path.parent.glob(f"{glob.escape(path.name)}.*")):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise ProviderError(f"Cannot remove {path}", why=error.strerror or str(error)) from error


def _open(path: Path) -> io.FileIO:
    """Open a file to read; an empty one where it does not exist.  Links are not followed."""
    try:
        return io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError:
        return io.FileIO(os.devnull)


def _pieces(line: bytes) -> Iterator[bytes]:
    line = line.rstrip(b"\r")
    for at in range(0, max(1, len(line)), MAX_LINE):
        yield line[at : at + MAX_LINE]
