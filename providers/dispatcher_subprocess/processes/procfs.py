"""What /proc says of processes and namespaces."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterable, Iterator

from dispatcher.plugin import deadline, process_stat

_OWNER = 0xB701  # the request NS_GET_USERNS of ioctl_nsfs(2)
#: The kernel's id of this boot; it does not change while a process lives.
boot_id = functools.cache(deadline.boot_id)


def read(path: str) -> bytes:
    """Return a small file's content; b"" if the file or its process is gone, or it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""


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
        found = process_stat(pid)
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
