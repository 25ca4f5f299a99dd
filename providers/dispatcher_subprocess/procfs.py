"""Processes in /proc, and signals through pidfds, which do not reach another process that reuses a pid.

A pid and a start time together identify a process; a pid alone may be reused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dispatcher.plugin import deadline

_DEAD = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class Stat:
    """A few fields of ``/proc/PID/stat``.

    :ivar start: clock ticks after boot; with the pid it identifies a process.
    """

    pid: int
    state: str
    parent: int
    group: int
    session: int
    cpu: int
    start: int

    @property
    def dead(self) -> bool:
        """Whether it has ended: a zombie executes nothing."""
        return self.state in _DEAD


@functools.cache
def boot_id() -> str:
    """Return the kernel's id of this boot; it does not change while a process lives."""
    return deadline.boot_id()


def read(path: str) -> bytes | None:
    """Return a small file's content; None if the file or its process is gone, or it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        chunks = []
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
        return b"".join(chunks)
    except OSError:
        return None
    finally:
        os.close(fd)


def stat(pid: int) -> Stat | None:
    """Return the state of a process, None if the pid does not exist."""
    text = read(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(
        pid=pid,
        state=fields[0].decode(),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        cpu=int(fields[11]) + int(fields[12]),
        start=int(fields[19]),
    )


def lives(pid: int, start: int) -> bool:
    """Whether the process of that pid *and* start time executes; a zombie does not."""
    found = stat(pid)
    return found is not None and found.start == start and not found.dead


def pids() -> list[int]:
    """Return all processes of this pid namespace."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def open_pidfd(pid: int, start: int) -> int | None:
    """Return a pidfd of exactly that process, None if it is gone (or another one has its pid).

    :raises OSError: no descriptor is available.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    found = stat(pid)
    if found is None or found.start != start:
        os.close(fd)
        return None
    return fd


def send(pid: int, start: int, number: int) -> bool:
    """Send a signal to exactly that process; False when it is gone."""
    try:
        fd = open_pidfd(pid, start)
    except OSError:  # no descriptor left: signal the pid, checked a moment before
        return lives(pid, start) and _kill(pid, number)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def uids(pid: int) -> frozenset[int]:
    """Return the real, effective, saved and file-system user ids of a process."""
    for line in (read(f"/proc/{pid}/status") or b"").splitlines():
        if line.startswith(b"Uid:"):
            return frozenset(int(word) for word in line.split()[1:])
    return frozenset()


def namespace(pid: int, kind: str) -> int:
    """Return the inode of a process's namespace (`kind` is ``pid``, ``net``, ...); 0 when it cannot be read."""
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except OSError:
        return 0


def children(pid: int) -> list[int]:
    """Return the children of a process's main thread."""
    return [int(word) for word in (read(f"/proc/{pid}/task/{pid}/children") or b"").split()]


def inner_pid(pid: int) -> int:
    """Return a process's pid as its own pid namespace numbers it, 0 when it is gone."""
    for line in (read(f"/proc/{pid}/status") or b"").splitlines():
        if line.startswith(b"NSpid:"):
            return int(line.split()[-1])
    return 0


def descendants(roots: Iterable[int]) -> set[int]:
    """Return `roots` and every process below them by parenthood, as far as it is still known."""
    parents: dict[int, list[int]] = {}
    for pid in pids():
        found = stat(pid)
        if found:
            parents.setdefault(found.parent, []).append(pid)
    todo, seen = list(roots), set()
    while todo:
        pid = todo.pop()
        if pid not in seen:
            seen.add(pid)
            todo += parents.get(pid, [])
    return seen


def open_inodes(pid: int, kind: str) -> Iterator[int]:
    """Yield the inodes of a process's open descriptors of a kind: ``socket`` or ``pipe``."""
    prefix = f"{kind}:["
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith(prefix):
                    yield int(target[len(prefix) : -1])


def writes_to(pid: int, pipe: int) -> bool:
    """Whether a process has a pipe as its standard output or error."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{number}") == f"pipe:[{pipe}]":
                return True
    return False


def open_paths(pid: int) -> frozenset[str]:
    """Return the paths of a process's open descriptors, as far as they may be read."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return frozenset(found)
