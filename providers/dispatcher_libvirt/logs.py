"""Logs of a machine: its serial console, in files that virtlogd writes and rotates.

The files are in the agent's log directory, which belongs to the manager: `console.log` and, once it is full
(virtlogd's max_size, 2 MiB), `console.log.0` and so on, oldest last.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
from pathlib import Path

from dispatcher.plugin import printable
from dispatcher_libvirt.errors import disk_errors

NAME = "console.log"
START = b"dispatcher: the machine starts"
_ENDED = re.compile(rb"dispatcher: the app ended: ([\x20-\x7e]{1,200})")
_PREFIX = "dispatcher: "
_LISTENING = re.compile(rb"dispatcher: nothing listens at the app's port, only at ([\x20-\x7e]{1,400})")
_OOM = re.compile(rb"[Oo]ut of memory: Killed process \d+")
_RECENT = 256 * 1024  # bytes of the console that are searched
_PANIC = re.compile(rb"Kernel panic - not syncing: ([\x20-\x7e]{1,200})")


def begin(log_dir: Path) -> Path:
    """Mark the start of a machine in its log, as earlier lines belong to earlier machines; return the file.

    :raises ProviderError: the log is not writable.
    """
    path = log_dir / NAME
    with disk_errors("writing to the machine's log", log_dir):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "ab") as file:
            file.write(START + b"\n")
    return path


def last_line(log_dir: Path) -> str:
    """Return the last line in printable form, without the prefix "dispatcher: ": the progress of a boot."""
    text = _last_lines(log_dir, 4096)[0].decode(errors="replace").strip().removeprefix(_PREFIX)
    return printable(text, 120).strip("'\"") if text else ""


def announced(log_dir: Path, words: str) -> bool:
    """Whether the console's last lines contain `words` since the start of the machine."""
    for line in _last_lines(log_dir, _RECENT)[:1000]:
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


def oom_kills(log_dir: Path) -> int:
    """Return how often the guest's kernel reports on the console that it killed a process for memory."""
    try:
        found = (log_dir / NAME).stat()
    except OSError:
        return 0
    return _oom_kills(log_dir, found.st_ino, found.st_size)


@functools.lru_cache(maxsize=4096)
def _oom_kills(log_dir: Path, _inode: int, _size: int) -> int:
    """Count them; the last two arguments tell whether the console has anything new."""
    since = itertools.takewhile(lambda line: not line.endswith(START), _last_lines(log_dir, _RECENT))
    return sum(_OOM.search(line) is not None for line in since)


def listeners(log_dir: Path) -> list[str]:
    """Return where the guest says that programs listen, as it tells while none does at the app's port."""
    for line in itertools.takewhile(lambda line: not line.endswith(START), _last_lines(log_dir, _RECENT)):
        if match := _LISTENING.search(line):
            return match[1].decode().split()
    return []


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
