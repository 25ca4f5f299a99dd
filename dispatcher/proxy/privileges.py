"""What a process of the proxy changes about itself: user, capabilities, limits, glibc's allocator."""

from __future__ import annotations

import ctypes
import os
import resource

from dispatcher.config.host_users import HostAccounts
from dispatcher.plugin.errors import Unavailable

SPARE_DESCRIPTORS = 512  # for files that are not connections
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
# mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def most_connections(wanted: int) -> int:
    """Return how many connections of `wanted` the limit of open files allows; each has one to its agent."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, (soft - SPARE_DESCRIPTORS) // 2))


def drop(accounts: HostAccounts) -> None:
    """Change to the proxy's user and group, permanently and without other groups.

    :raises Unavailable: the kernel refuses; the proxy must not serve then.
    """
    try:
        if os.geteuid() == 0:
            os.setgroups([accounts.proxy_gid])
            os.setresgid(accounts.proxy_gid, accounts.proxy_gid, accounts.proxy_gid)
            os.setresuid(accounts.proxy_uid, accounts.proxy_uid, accounts.proxy_uid)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise Unavailable("Cannot become the proxy's user", why=error.strerror or str(error)) from error
    if accounts.proxy_uid != 0 and 0 in os.getresuid():
        raise Unavailable("Cannot become the proxy's user", why="the process could still become root")


def die_with_parent(number: int) -> None:
    """Let the kernel signal this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def raise_descriptor_limit(wanted: int) -> int:
    """Raise the limit of open files towards `wanted`; return what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted and os.geteuid() == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        except (OSError, ValueError):
            pass
        else:
            return wanted
    best = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= best:
        return soft if soft != resource.RLIM_INFINITY else wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (best, hard))
    return best


def keep_buffers() -> None:
    """Keep freed buffers of bodies: a piece has up to 256 KiB, and the next one follows at once.

    By default glibc returns such buffers to the kernel each time, which must then fill them with zeros, page by
    page: a third of the CPU time of an upload.  At most 4 MiB stay unused.
    """
    _mallopt({_M_TRIM_THRESHOLD: 4 << 20, _M_TOP_PAD: 1 << 20, _M_MMAP_THRESHOLD: 1 << 20})


def share_one_heap() -> None:
    """Let all threads allocate from one heap: otherwise each of many idle threads keeps its own part."""
    _mallopt({_M_ARENA_MAX: 1})


def _mallopt(options: dict[int, int]) -> None:
    """Set options; a no-op with other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
