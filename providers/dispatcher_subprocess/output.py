"""Reading an agent's log files: the last lines, and new ones as they come.  Reads what the log pump writes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dispatcher.plugin import Deadline

FILE = "output.log"
MAX_LINE = 65536
_INTERVAL = 0.2  # seconds between looks for new output


def log_file(log_dir: str | Path) -> Path:
    """Return the current log file in an agent's log directory."""
    return Path(log_dir) / FILE


def read_lines(path: Path, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
    """Yield the last `tail` lines, rotated files included, then with `follow` new ones until the deadline."""
    fd, lines, rest = _tail(path, tail)
    try:
        for line in lines:
            yield from split(line)
        if follow:
            yield from _follow(path, fd, rest, deadline)
        elif rest and tail > 0:
            yield from split(rest)
    finally:
        if fd >= 0:
            os.close(fd)


def split(line: bytes) -> Iterator[bytes]:
    """Yield a line in pieces of at most 64 KiB."""
    line = line.removesuffix(b"\r")
    for at in range(0, max(1, len(line)), MAX_LINE):
        yield line[at : at + MAX_LINE]


def remove(path: Path) -> None:
    """Remove an agent's log files; absent is success."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    for number in range(1, 101):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(f"{path.name}.{number}").unlink()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1


def _tail(path: Path, tail: int) -> tuple[int, list[bytes], bytes]:
    """Return the open current file (at its end) or -1, the last whole lines, and what follows the last newline."""
    fd = _open(path)
    text = _all(fd)
    number = 1
    while text.count(b"\n") <= tail:
        older = _open(path.with_name(f"{path.name}.{number}"))
        if older < 0:
            break
        try:
            text = _all(older) + text
        finally:
            os.close(older)
        number += 1
    *lines, rest = text.split(b"\n")
    if tail <= 0:
        return fd, [], rest
    return fd, lines[-(tail - (1 if rest else 0)) :] if tail > 1 or not rest else [], rest


def _all(fd: int) -> bytes:
    chunks = []
    while fd >= 0 and (chunk := os.read(fd, 1 << 20)):
        chunks.append(chunk)
    return b"".join(chunks)


def _follow(path: Path, fd: int, rest: bytes, deadline: Deadline) -> Iterator[bytes]:
    current = fd
    try:
        while True:
            chunk = os.read(current, MAX_LINE) if current >= 0 else b""
            if chunk:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield from split(line)
                while len(rest) >= MAX_LINE:
                    yield rest[:MAX_LINE]
                    rest = rest[MAX_LINE:]
                continue
            fresh = _renewed(path, current)
            if fresh >= 0:
                rest += _all(current)  # what was written between the last read and the rotation
                if current >= 0 and current != fd:
                    os.close(current)
                current = fresh
                continue
            if deadline.expired:
                break
            time.sleep(min(_INTERVAL, deadline.remaining()))
        if rest:
            yield from split(rest)
    finally:
        if current >= 0 and current != fd:
            os.close(current)


def _renewed(path: Path, current: int) -> int:
    """Return the new current file when it was rotated (or has just appeared), else -1; read the old one first."""
    fresh = _open(path)
    if fresh < 0:
        return -1
    if current >= 0:
        new, old = os.fstat(fresh), os.fstat(current)
        if new.st_ino == old.st_ino:
            if new.st_size < os.lseek(current, 0, os.SEEK_CUR):
                os.lseek(current, 0, os.SEEK_SET)
            os.close(fresh)
            return -1
    return fresh
