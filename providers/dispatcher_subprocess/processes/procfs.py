"""Processes in /proc, and signals through pidfds, which do not reach another process that reuses a pid."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dispatcher.plugin import deadline

_SEARCH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_DEAD = frozenset("ZXx")
_OWNER = 0xB701  # the request NS_GET_USERNS of ioctl_nsfs(2)
#: The kernel's id of this boot; it does not change while a process lives.
boot_id = functools.cache(deadline.boot_id)


@dataclass(frozen=True, slots=True)
class Process:
    """A process, identified by pid and start time (clock ticks after boot); a pid alone may be reused."""

    pid: int
    start: int

    @property
    def lives(self) -> bool:
        """Whether it executes; a zombie does not."""
        found = stat(self.pid)
        return found is not None and found.start == self.start and not found.dead

    def open(self) -> int | None:
        """Return a pidfd, None if the process is gone.

        :raises OSError: no descriptor is available.
        """
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        found = stat(self.pid)
        if found is None or found.start != self.start:
            os.close(fd)
            return None
        return fd

    def send(self, number: int) -> bool:
        """Send a signal; False when the process is gone."""
        try:
            fd = self.open()
        except OSError:  # no descriptor left: signal the pid, checked a moment before
            if self.lives:
                with contextlib.suppress(OSError):
                    os.kill(self.pid, number)
                    return True
            return False
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True


@dataclass(frozen=True, slots=True)
class Stat(Process):
    """A few fields of ``/proc/PID/stat``; `cpu` in clock ticks."""

    state: str
    parent: int
    cpu: int

    @property
    def dead(self) -> bool:
        """Whether it has ended: a zombie executes nothing."""
        return self.state in _DEAD

    @property
    def process(self) -> Process:
        """The process alone."""
        return Process(self.pid, self.start)


def read(path: str) -> bytes:
    """Return a small file's content; b"" if the file or its process is gone, or it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""


def stat(pid: int) -> Stat | None:
    """Return the state of a process, None if the pid does not exist."""
    text = read(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(
        pid=pid,
        start=int(fields[19]),
        state=fields[0].decode(),
        parent=int(fields[1]),
        cpu=int(fields[11]) + int(fields[12]),
    )


def pids() -> list[int]:
    """Return all processes of this pid namespace."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def status(pid: int, key: bytes) -> list[int]:
    """Return the numbers of a line of ``/proc/PID/status``; none when the process is gone."""
    for line in read(f"/proc/{pid}/status").splitlines():
        if line.startswith(key + b":"):
            return [int(word) for word in line.split()[1:]]
    return []


def namespace(pid: int, kind: str) -> int:
    """Return the inode of a process's namespace (`kind` is ``pid``, ``net``, ...); 0 when it cannot be read."""
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except OSError:
        return 0


def owner(namespace: int) -> int:
    """Return a new descriptor of the user namespace that owns a namespace, which its processes may have left.

    :raises OSError: it is not ours.
    """
    return fcntl.ioctl(namespace, _OWNER)


def children(pid: int) -> list[int]:
    """Return the children of a process's main thread."""
    return [int(word) for word in read(f"/proc/{pid}/task/{pid}/children").split()]


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


def descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """Yield a process's open descriptors and what they are: a path, ``socket:[INODE]`` or ``pipe:[INODE]``."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield int(name), os.readlink(f"/proc/{pid}/fd/{name}")


def which(name: str) -> str:
    """Return the path of a system program, "" if it is absent; users' own directories are not searched."""
    return shutil.which(name, path=_SEARCH) or ""
