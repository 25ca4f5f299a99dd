"""Logs of a machine: its serial console, in files that virtlogd writes and rotates.

The files are in the agent's log directory, which belongs to the manager: `console.log` and, once it is full
(virtlogd's max_size, 2 MiB), `console.log.0` and so on, oldest last.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from dispatcher.plugin import Deadline, printable

NAME = "console.log"
START = b"dispatcher: the machine starts"
MAX_LINE = 64 * 1024
_BLOCK = 64 * 1024
_MAX_TAIL = 8 << 20  # bytes to read backwards
_PAUSE = 0.25
_ENDED = re.compile(rb"dispatcher: the app ended: ([\x20-\x7e]{1,200})")
_PREFIX = "dispatcher: "
_PANIC = re.compile(rb"Kernel panic - not syncing: ([\x20-\x7e]{1,200})")


def lines(log_dir: Path, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
    """Yield the last `tail` lines, then with `follow` new ones until the deadline; none without a file."""
    path = log_dir / NAME
    file, position = _state(path)
    before, rest = _tail(log_dir, tail, follow=follow, size=position)
    yield from before
    if not follow:
        return
    while not deadline.expired:
        now, size = _state(path)
        if now != file:  # rotated: the rest of it is in the first old file
            rest += _read(log_dir / f"{NAME}.0", position, file)
            file, position = now, 0
        block = _read(path, position, now) if size > position else b""
        position += len(block)
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield from _pieces(line)
        if len(rest) > MAX_LINE:
            yield from _pieces(rest)
            rest = b""
        if not block:
            time.sleep(min(_PAUSE, deadline.remaining()))


def begin(log_dir: Path) -> None:
    """Mark the start of a machine in the log: earlier lines belong to earlier machines.

    :raises OSError: the log is not writable.
    """
    fd = os.open(log_dir / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, START + b"\n")
    finally:
        os.close(fd)


def last_line(log_dir: Path) -> str:
    """Return the last line in printable form, without the prefix "dispatcher: ": the progress of a boot."""
    found, _ = _tail(log_dir, 1, follow=False, most=4096)
    text = found[0].decode(errors="replace").strip().removeprefix(_PREFIX) if found else ""
    return printable(text, 120).strip("'\"") if text else ""


def announced(log_dir: Path, words: str) -> bool:
    """Whether the console's last lines contain `words` since the start of the machine."""
    found, _ = _tail(log_dir, 1000, follow=False, most=256 * 1024)
    for line in reversed(found):
        if words.encode() in line:
            return True
        if line.endswith(START):
            return False
    return True


def exit_reason(log_dir: Path) -> str:
    """Return the guest's own reason for its end, of its app or of a panic, from its last lines, or ""."""
    found, _ = _tail(log_dir, 40, follow=False, most=16384)
    for line in reversed(found):
        if line.endswith(START):
            return ""
        if match := _ENDED.search(line):
            return match[1].decode()
        if match := _PANIC.search(line):
            return f"kernel panic: {match[1].decode()}"
    return ""


def _tail(
    log_dir: Path, count: int, *, follow: bool, most: int = _MAX_TAIL, size: int | None = None
) -> tuple[list[bytes], bytes]:
    """Return the last lines and, with `follow`, the start of a line that is still incomplete.

    :param size: size of the newest file when the caller looked; later bytes are followed.
    """
    data = b""
    for path in _files(log_dir):
        block = _last_bytes(path, most - len(data), size if path.name == NAME else None)
        data = block + data
        if data.count(b"\n") > count or len(data) >= most:
            break
    *whole, rest = data.split(b"\n")
    if rest and not follow:
        whole.append(rest)
    if len(data) >= most and len(whole) > 1:
        whole = whole[1:]  # its start is missing
    found = [piece for line in whole[-count:] for piece in _pieces(line)] if count > 0 else []
    return found[-count:] if count > 0 else [], rest


def _files(log_dir: Path) -> Iterator[Path]:
    yield log_dir / NAME
    for number in range(100):
        path = log_dir / f"{NAME}.{number}"
        if not path.exists():
            return
        yield path


def _pieces(line: bytes) -> Iterator[bytes]:
    line = line.rstrip(b"\r")
    for at in range(0, max(1, len(line)), MAX_LINE):
        yield line[at : at + MAX_LINE]


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_size


def _read(path: Path, position: int, inode: int) -> bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_ino != inode:
                return b""
            file.seek(position)
            return file.read(_BLOCK)
    except OSError:
        return b""


def _last_bytes(path: Path, most: int, size: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            now = os.fstat(file.fileno()).st_size
            end = now if size is None else min(now, size)
            start = max(0, end - most)
            file.seek(start)
            return file.read(end - start)
    except OSError:
        return b""
