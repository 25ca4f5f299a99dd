"""Calls of plugins, contained: whatever one raises becomes an error of dispatcher's tree that names it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dispatcher.plugin.errors import DispatcherError, ProviderError
from dispatcher.plugin.names import printable

REPORT = "report this fault to the author of the plugin"

_log = logging.getLogger("dispatcher.plugin")


@contextmanager
def contained(
    plugin: str,
    call: str,
    *,
    log: logging.Logger | None = _log,
    error: type[DispatcherError] = ProviderError,
    secret: bool = False,
) -> Iterator[None]:
    """Translate everything that the block's call of a plugin raises, SystemExit too; only Ctrl-C passes.

    :param plugin: such as "provider docker"; :param log: gets the traceback.
    :param secret: the exception's text can hold a password: only its type is shown.
    :raises DispatcherError: as the plugin, or `error` in place of any other exception.
    """
    try:
        yield
    except DispatcherError:
        raise
    except BaseException as fault:
        if isinstance(fault, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        if log:
            log.exception("The %s failed in %s", plugin, call, exc_info=not secret)
        raise error(
            f"The {plugin} failed in {call}",
            why=type(fault).__name__ if secret else f"{type(fault).__name__}: {_text(fault)}",
            fix=f"{REPORT}; the log has the details" if log and not secret else REPORT,
        ) from (None if secret else fault)


def _text(fault: BaseException) -> str:
    try:
        return printable(str(fault), 300)
    except BaseException:  # the plugin's own code, too
        return "its text cannot be shown"
