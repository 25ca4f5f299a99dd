"""Logs of a machine: its serial console, in files that virtlogd writes and rotates.

The files are in the agent's log directory, which belongs to the manager: `console.log` and, once it is full
(virtlogd's max_size, 2 MiB), `console.log.0` and so on, oldest last.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from dispatcher.plugin import Deadline, ProviderError, printable

NAME = "console.log"
START = b"dispatcher: the machine starts"
MAX_LINE = 64 * 1024
_BLOCK = 64 * 1024
_PAUSE = 0.25
_ENDED = re.compile(rb"dispatcher: the app ended: ([\x20-\x7e]{1,200})")
_PREFIX = "dispatcher: "
_PANIC = re.compile(rb"Kernel panic - not syncing: ([\x20-\x7e]{1,200})")


def lines(log_dir: Path, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
    """Yield the last `tail` lines, then with `follow` new ones until the deadline; none without a file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(log_dir / NAME))
        text, number = file.read(), 0
        while text.count(b"\n") <= tail and (older := log_dir / f"{NAME}.{number}").exists():
            text, number = older.read_bytes() + text, number + 1
        *whole, rest = text.split(b"\n")
        if rest and not follow:
            whole.append(rest)
        if tail > 0:
            yield from [piece for line in whole[-tail:] for piece in _pieces(line)][-tail:]
        while follow and not deadline.expired:
            block = file.read(_BLOCK)
            new = None if block else _open(log_dir / NAME)
            if new and not os.path.sameopenfile(new.fileno(), file.fileno()):
                block = file.read()  # written between the last read and the rotation
                file = stack.enter_context(new)
            elif new:
                new.close()
                time.sleep(min(_PAUSE, deadline.remaining()))
            *whole, rest = (rest + block).split(b"\n")
            if len(rest) > MAX_LINE:
                whole, rest = [*whole, rest], b""
            for line in whole:
                yield from _pieces(line)


def begin(log_dir: Path) -> Path:
    """Mark the start of a machine in its log, as earlier lines belong to earlier machines; return the file.

    :raises ProviderError: the log is not writable.
    """
    path = log_dir / NAME
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "ab") as file:
            file.write(START + b"\n")
    except OSError as error:
        raise ProviderError(
            f"The log in {log_dir} is not writable",
            why=error.strerror or str(error),
            fix="check that the disk has space and that the directory belongs to the manager",
        ) from error
    return path


def last_line(log_dir: Path) -> str:
    """Return the last line in printable form, without the prefix "dispatcher: ": the progress of a boot."""
    text = _last_lines(log_dir, 4096)[0].decode(errors="replace").strip().removeprefix(_PREFIX)
    return printable(text, 120).strip("'\"") if text else ""


def announced(log_dir: Path, words: str) -> bool:
    """Whether the console's last lines contain `words` since the start of the machine."""
    for line in _last_lines(log_dir, 256 * 1024)[:1000]:
        if words.encode() in line:
            return True
        if line.endswith(START):
            return False
    return True


def exit_reason(log_dir: Path) -> str:
    """Return the guest's own reason for its end, of its app or of a panic, from its last lines, or ""."""
    for line in _last_lines(log_dir, 16384)[:40]:
        if line.endswith(START):
            return ""
        if match := _ENDED.search(line):
            return match[1].decode()
        if match := _PANIC.search(line):
            return f"kernel panic: {match[1].decode()}"
    return ""


def _last_lines(log_dir: Path, most: int) -> list[bytes]:
    """Return the lines in the last bytes of the console's output, the newest first; at least one."""
    data = b""
    for name in (f"{NAME}.0", NAME):
        with _open(log_dir / name) as file:
            file.seek(-min(most, os.fstat(file.fileno()).st_size), os.SEEK_END)
            data = (data + file.read())[-most:]
    return data.removesuffix(b"\n").split(b"\n")[::-1]


def _open(path: Path) -> io.FileIO:
    """Open a file to read; an empty one where it does not exist."""
    try:
        return path.open("rb", buffering=0)
    except OSError:
        return Path(os.devnull).open("rb", buffering=0)


def _pieces(line: bytes) -> Iterator[bytes]:
    line = line.rstrip(b"\r")
    for at in range(0, max(1, len(line)), MAX_LINE):
        yield line[at : at + MAX_LINE]
