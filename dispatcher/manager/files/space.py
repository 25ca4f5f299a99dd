"""Free space on the disk of the manager's state, for a warning before it is full."""

from __future__ import annotations

import os
from pathlib import Path

from dispatcher.common.humanize import size

LOW_SHARE = 0.1  # of a disk: less free space is low
LOW_BYTES = 5 << 30  # but no more than so much


def free_space(directory: Path) -> int:
    """Return the bytes that are free on a directory's disk for a user without privileges."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def low_space(directory: Path) -> str:
    """Return a sentence when the disk of a directory is almost full, else ""."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return ""  # the database reports a disk that is gone
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if free < min(LOW_SHARE * total, LOW_BYTES):
        return f"Only {size(free)} of {size(total)} are free on the disk of {directory}"
    if found.f_files and found.f_favail < LOW_SHARE / 2 * found.f_files:
        return f"Only {found.f_favail} of {found.f_files} inodes are free on the disk of {directory}"
    return ""
