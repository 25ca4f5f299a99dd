"""Errors of the operating system, translated to the project's errors."""

from __future__ import annotations

import errno

from dispatcher.plugin import ProviderError, Unavailable

_FULL = frozenset([errno.ENOSPC, errno.EDQUOT])


def failed(what: str, error: OSError | ValueError, *, fix: str = "") -> ProviderError:
    """Return the error for an operation that the kernel or the file system refused.

    :param what: a sentence such as "Cannot write FILE"; :param fix: unless the disk is full.
    """
    full = isinstance(error, OSError) and error.errno in _FULL
    return ProviderError(what, why=reason(error), fix="free some space" if full else fix)


def unreadable(path: object, error: OSError) -> Unavailable:
    """Return the error for a file that cannot be read now; the agents' state is unknown."""
    return Unavailable(f"Cannot read {path}", why=reason(error), fix="repair the state directory")


def reason(error: OSError | ValueError) -> str:
    """Return an error's own words."""
    return getattr(error, "strerror", None) or str(error)
