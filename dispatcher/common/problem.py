"""Problem documents (RFC 9457): the form of every error that a program gets over HTTP."""

from __future__ import annotations

import math
from typing import Any

from dispatcher.plugin.errors import DispatcherError

MEDIA_TYPE = "application/problem+json"


def document(
    status: int, title: str, detail: str = "", fix: str = "", code: str = "", **more: object
) -> dict[str, Any]:
    """Return a problem document.

    :param title: what happened; :param detail: why; :param fix: what the reader can do.
    :param code: machine-readable, by default the title in lower case with hyphens.
    """
    return {
        **more,
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "fix": fix,
        "code": code or title.lower().replace(" ", "-"),
    }


def of_error(error: DispatcherError) -> dict[str, Any]:
    """Return the problem document of an error, its details included."""
    return error.details | document(error.status, error.what, error.why, error.fix, error.code)


def retry_after(error: DispatcherError) -> dict[str, str]:
    """Return the header field that says when trying again makes sense (RFC 9110, 10.2.3), if it does."""
    if error.retry_after is None and error.status not in {429, 503}:
        return {}
    return {"Retry-After": str(max(1, math.ceil(error.retry_after or 1)))}
