"""The open directories of processes, from /proc."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

_KCMP = {"x86_64": 312, "aarch64": 272}  # the system call of kcmp(2)
_KCMP_FILES = 2
_LIBC = ctypes.CDLL(None, use_errno=True)
_COMPARED = 16  # tables of open files of one process that are told apart; ordinary ones have one


def directories_of(proc: Path, pids: Iterable[int], most: int) -> int:
    """Return the number of open directories of processes, or one above `most`.

    :param most: fewer open files than this are not looked at.
    """
    tables = [table for pid in pids for table in _tables(proc, pid)]
    if sum(map(_size, tables)) <= most:
        return 0
    found = 0
    for table in tables:
        found += sum(map(_is_directory, _entries(table)))
        if found > most:
            break
    return found


def _tables(proc: Path, pid: int) -> Iterator[str]:
    """Yield the directories of /proc with the tables of open files of a process: threads may have their own."""
    different: list[str] = []
    for thread in _names(f"{proc}/{pid}/task"):
        if len(different) < _COMPARED and any(_same(thread, other) for other in different):
            continue
        different.append(thread)
        yield f"{proc}/{pid}/task/{thread}/fd"


def _same(thread: str, other: str) -> bool:
    """Whether two threads have one table, as far as the kernel tells it."""
    if (call := _KCMP.get(platform.machine())) is None:
        return True
    answer: int = _LIBC.syscall(call, int(thread), int(other), _KCMP_FILES, 0, 0)
    return answer == 0 or (answer < 0 and ctypes.get_errno() != errno.ESRCH)


def _size(table: str) -> int:
    """Return the number of open files."""
    with contextlib.suppress(OSError):
        return os.stat(table).st_size or len(os.listdir(table))  # the kernel tells it since 6.2
    return 0


def _names(directory: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(directory)
    return []


def _entries(table: str) -> Iterator[str]:
    return (f"{table}/{name}" for name in _names(table))


def _is_directory(entry: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISDIR(os.stat(entry).st_mode)
    return False
