"""Errors of the operating system, translated to the project's errors."""

from __future__ import annotations

from dispatcher.plugin import ProviderError, Unavailable


def failed(what: str, error: BaseException, *, fix: str = "") -> ProviderError:
    """Return the error for an operation that the kernel or the file system refused.

    :param what: a sentence such as "Cannot write FILE".
    """
    return ProviderError(what, why=reason(error), fix=fix)


def unreadable(path: object, error: OSError) -> Unavailable:
    """Return the error for a file that cannot be read now; the agents' state is unknown."""
    return Unavailable(f"Cannot read {path}", why=reason(error), fix="repair the state directory")


def reason(error: BaseException) -> str:
    """Return an error's own words."""
    return getattr(error, "strerror", None) or str(error)
