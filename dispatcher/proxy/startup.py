"""What the proxy daemon does once at its start: load modules for its children, open the access log."""

from __future__ import annotations

import importlib
import os

from dispatcher.plugin.errors import Unavailable

_NEEDED = (
    *(f"encodings.{name}" for name in ("ascii", "idna", "latin_1", "punycode", "unicode_escape")),
    "uvloop",
    "dispatcher.proxy.edge.process",
    "dispatcher.proxy.portal.server",
)


def preload() -> None:
    """Load the children's modules once for all, while they are readable.

    The proxy's user may have no access to where Python or this program lie (below root's home, say).
    """
    for module in _NEEDED:
        importlib.import_module(module)


def open_access_log(target: str, owner: tuple[int, int] | None) -> int | None:
    """Return the access log's descriptor, None without a log.

    :param owner: the user that must be able to reopen it; None for the current user.
    :raises Unavailable: it cannot be opened.
    """
    if not target:
        return None
    if target == "-":
        return 1
    try:
        fd = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        if owner is not None and os.geteuid() == 0:
            os.fchown(fd, *owner)
    except OSError as error:
        raise Unavailable(
            f"Cannot open the access log {target}", why=error.strerror or str(error), fix="see proxy.access_log"
        ) from error
    return fd
