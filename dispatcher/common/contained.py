"""Calls of plugins, contained: whatever one raises becomes an error of dispatcher's tree that names it.

`contained` is for calls in threads that may hang (those of a pool, which abandons them), `bounded` for all others.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from dispatcher.common.plain import plain
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, PluginError, ProviderError
from dispatcher.plugin.names import printable

SECONDS = 30.0  # for a bounded call, such as an import: a slow host that is busy needs more than ten
_SLICE = 0.1  # seconds between two moments at which a waiting main thread handles signals
MAX_WHAT, MAX_TEXT = 500, 4000  # characters of the texts of an error
MAX_DETAILS = 65536  # characters of an error's details as JSON
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

_T = TypeVar("_T")
_log = logging.getLogger("dispatcher.plugin")


@dataclass(frozen=True, slots=True)
class PluginRef:
    """A plugin as errors name it.

    :ivar kind: provider, authenticator, observer or plugin; :ivar distribution: ``NAME VERSION``, "" if unknown.
    """

    kind: str
    name: str
    distribution: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def report(self) -> str:
        """What to do about a fault of the plugin."""
        return f"report this fault to the authors of {self.distribution or 'the plugin'}"


def text(value: object, limit: int = MAX_TEXT) -> str:
    """Return a plugin's text, or what should have been one: no surrogates or control characters, cut."""
    try:
        found = plain(value).decode(errors="replace") if isinstance(value, bytes) else plain(_str(value))
        shown = _UNFIT.sub(lambda match: match[0].encode("unicode_escape").decode(), found[: limit + 1])
    except BaseException:  # the plugin's own code, too
        return "its text cannot be shown"
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _str(value: object) -> str:
    return value if isinstance(value, str) else str(value)


@contextmanager
def contained(
    plugin: PluginRef,
    call: str,
    *,
    log: logging.Logger | None = _log,
    error: type[DispatcherError] = ProviderError,
    secret: bool = False,
) -> Iterator[None]:
    """Translate everything that the block's call of a plugin raises, SystemExit too; only Ctrl-C passes.

    :param log: gets the traceback.
    :param secret: the exception's text can hold a password: only its type is shown.
    :raises DispatcherError: as the plugin, its texts checked, or `error` in place of any other exception.
    """
    try:
        yield
    except BaseException as fault:
        # By type: the code of a hostile exception would run for `isinstance`, and for its traceback.
        kind = type(fault)
        if issubclass(kind, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        known = _checked(fault) if issubclass(kind, DispatcherError) else None
        if known is fault:
            raise
        cause = None if secret else shown(fault)
        if known is not None:
            raise known from cause
        if log:
            log.error("The %s failed in %s", plugin, call, exc_info=cause)  # noqa: TRY400 - perhaps without it
        raise error(
            f"The {plugin} failed in {call}",
            why=kind.__name__ if secret else f"{kind.__name__}: {_message(fault)}",
            fix=f"{plugin.report}; the log has the details" if log and not secret else plugin.report,
        ) from cause


def shown(fault: BaseException) -> BaseException | None:
    """Return an exception whose traceback can be written, which runs the code of a plugin; None for another."""
    try:
        traceback.format_exception(fault)
    except BaseException:
        return None
    return fault


def bounded(
    plugin: PluginRef,
    call: str,
    work: Callable[[], _T],
    *,
    seconds: float | None = None,
    log: logging.Logger | None = _log,
    error: type[DispatcherError] = PluginError,
    secret: bool = False,
) -> _T:
    """Return the result of a plugin's call, contained; it runs in its own thread, with a time limit.

    The same call is not made again while an earlier one hangs.

    :param seconds: by default `SECONDS`.
    :raises DispatcherError: as `contained`, or `error`: it did not return in time.
    """
    seconds, key = seconds or SECONDS, (plugin, call)
    earlier = _hanging.get(key)
    if earlier is not None and earlier.is_alive():
        raise _hung(plugin, call, seconds, error)
    future: Future[_T] = Future()

    def run() -> None:
        try:  # contained here, where KeyboardInterrupt is the plugin's and not Ctrl-C
            with contained(plugin, call, log=log, error=error, secret=secret):
                found = work()
            future.set_result(found)
        except BaseException as fault:
            future.set_exception(fault)

    thread = threading.Thread(target=run, name=f"dispatcher-{plugin.name}", daemon=True)
    thread.start()
    deadline = Deadline(seconds)
    while True:
        try:
            return future.result(min(_SLICE, deadline.remaining()))
        except FutureTimeout:
            alive = thread.is_alive()
            if future.done():
                return future.result()
            if not alive:
                raise error(
                    f"The {plugin} failed in {call}",
                    why="its thread ended without a result, such as by a trace function",
                    fix=plugin.report,
                ) from None
            if deadline.expired:
                break
    _hanging[key] = thread
    if log:
        log.error("The %s does not return from %s; continuing without it", plugin, call)
    raise _hung(plugin, call, seconds, error)


def instance(cls: type[_T], **arguments: object) -> _T:
    """Return an instance of a plugin's class.

    :raises TypeError: its `__new__` returns something else.
    """
    made = cls(**arguments)
    if not isinstance(made, cls):
        raise TypeError(f"{cls.__name__}() returned a value of the type {type(made).__name__}")
    return made


def at_once(calls: Iterable[Callable[[], object]]) -> None:
    """Make calls at the same time and wait for all: a plugin that hangs delays no other.  None may raise."""
    threads = [threading.Thread(target=call, name="dispatcher-load", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(_SLICE)


_hanging: dict[tuple[PluginRef, str], threading.Thread] = {}


def _hung(plugin: PluginRef, call: str, seconds: float, error: type[DispatcherError]) -> DispatcherError:
    return error(
        f"The {plugin} does not return from {call}",
        why=f"it has taken more than {seconds:g} seconds, and is not called again before it returns",
        fix=f"{plugin.report}; after a repair, restart the manager",
    )


def _message(fault: BaseException) -> str:
    return printable(text(fault, 300), 300)


def _checked(error: Any) -> DispatcherError | None:
    """Return a plugin's error with texts, numbers and details as the core expects them.

    It stays the same object; but a class of the plugin's own is replaced by its base in the tree, as it may have
    any status.  None: it cannot be read.
    """
    try:
        base = next(cls for cls in type(error).__mro__ if cls.__module__.startswith("dispatcher."))
        what, why, fix = error.what, error.why, error.fix
        checked = cast("DispatcherError", error) if base is type(error) else base("")
        if not what or not isinstance(what, str):
            return None
        checked.what = text(what, MAX_WHAT)
        checked.why, checked.fix = (text(value) if value else "" for value in (why, fix))
        checked.retry_after = _seconds(error.retry_after)
        checked.details = _details(error.details)
    except BaseException:  # the plugin's own code, too
        return None
    return checked


def _seconds(value: object) -> float | None:
    if type(value) not in {int, float} or not 0 <= value < 1e9:  # type: ignore[operator]
        return None
    return float(value)  # type: ignore[arg-type]


def _details(value: object) -> dict[str, Any]:
    if not value or not isinstance(value, dict):
        return {}
    try:
        body = json.dumps(plain(value), allow_nan=False)
        found: dict[str, Any] = json.loads(body)
        json.dumps(found, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if len(body) <= MAX_DETAILS else {}
