"""The disk of the manager's state: free space, a warning before it is full, and what to do after an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dispatcher.common.humanize import size

LOW_SHARE = 0.1  # of a disk: less free space is low
LOW_BYTES = 5 << 30  # but no more than so much

#: What to do about errors that are of the disk.
DISK_FIXES = {
    errno.ENOSPC: "free some space on its disk",
    errno.EDQUOT: "raise the quota, or free some space",
    errno.EROFS: "mount its file system writable",
    errno.EIO: "check its disk: the kernel's log names the errors",
}


def disk_fix(error: OSError) -> str:
    """Return what to do about an error with a file: the disk is named only when it is the disk."""
    return DISK_FIXES.get(error.errno or 0, "check that it exists, and its owner and mode")


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


def file_system(directory: Path) -> tuple[str, str, str]:
    """Return type, device and options of a directory's file system; empty when the kernel does not say."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            mount, _, rest = line.partition(" - ")
            if mount.split(" ", 3)[2] == wanted:
                kind, source, options = rest.strip().split(" ", 2)
                return kind, source, options
    return "", "", ""
