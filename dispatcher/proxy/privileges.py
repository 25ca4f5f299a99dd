"""Drops privileges permanently: user and group ids, capabilities, limits."""

from __future__ import annotations

import ctypes
import os
import resource

from dispatcher.config.host_users import HostAccounts
from dispatcher.plugin.errors import Unavailable

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


SPARE_DESCRIPTORS = 512  # for files that are not connections


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


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
