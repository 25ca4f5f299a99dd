"""Logging for the daemons: one line for each event, for people or for programs.

Logged values come from others (names, addresses, an agent's output): control characters are escaped, the length of
every value is limited, and secrets are masked.  Importing this module is cheap: `configure` and `logger` load
structlog.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, TextIO

from dispatcher.common import redact

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

MAX_VALUE = 2000  # characters of one value
MAX_TRACE = 16000  # characters of a stack trace
MAX_DEPTH = 4
SECRET = "[not logged]"  # noqa: S105 - the mask

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

Event = MutableMapping[str, Any]


def logger(name: str) -> BoundLogger:
    """Return a logger: ``logger("manager").info("listening", address=...)``."""
    structlog = _structlog()
    bound: BoundLogger = structlog.stdlib.get_logger(f"dispatcher.{name}")
    return bound


def clean(text: str, limit: int = MAX_VALUE) -> str:
    """Return `text` without secrets, control characters escaped, cut to `limit` characters."""
    shown = redact.text(text[: limit * 2], SECRET)
    shown = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), shown)
    return shown if len(shown) <= limit and len(text) <= limit * 2 else shown[: limit - 1] + "…"


def configure(level: str = "info", format: str = "console", stream: TextIO | None = None) -> None:
    """Send everything that structlog and `logging` log to one stream.

    :param level: debug, info, warning or error.
    :param format: ``console`` for people, ``json`` for programs: one object for each line.
    :param stream: by default standard error.
    """
    structlog = _structlog()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _trace,
        _bounded,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    output = stream or sys.stderr
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(format)],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    set_level(level)
    logging.raiseExceptions = False  # a full disk must not raise an exception where something is logged


def set_level(level: str) -> None:
    """Change the level; libraries log warnings only, unless it is debug."""
    number = getattr(logging, level.upper())
    logging.getLogger("dispatcher").setLevel(number)
    logging.getLogger().setLevel(number if number == logging.DEBUG else max(number, logging.WARNING))


def _structlog() -> Any:
    """Return structlog without rich, which it would load for a renderer unused here: 4 MB in each daemon."""
    hidden = "structlog" not in sys.modules and "rich" not in sys.modules
    if hidden:
        sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog
    finally:
        if hidden:
            del sys.modules["rich"]
    return structlog


def _renderer(format: str) -> Any:
    if format == "json":
        return _structlog().processors.JSONRenderer()
    return _console


def _console(_logger: object, _method: str, event: Event) -> str:
    """``TIME LEVEL what key=value ...``, then a trace, each of its lines marked."""
    trace = event.pop("exception", "")
    head = f"{event.pop('timestamp', '')} {str(event.pop('level', '')).upper():7} {event.pop('event', '')}"
    pairs = "".join(f" {key}={_plain(value)}" for key, value in event.items())
    return head + pairs + "".join(f"\n    | {line}" for line in str(trace).splitlines())


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if text and " " not in text and '"' not in text else '"' + text.replace('"', '\\"') + '"'


def _trace(_logger: object, _method: str, event: Event) -> Event:
    """Turn `exc_info` into text whose lines cannot be confused with lines of the log."""
    found = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()
    elif isinstance(found, BaseException):
        found = (type(found), found, found.__traceback__)
    if isinstance(found, tuple) and found[0] is not None:
        lines = "".join(traceback.format_exception(*found)).splitlines()
        text = "\n".join(clean(line) for line in lines)
        event["exception"] = text if len(text) <= MAX_TRACE else "…" + text[-MAX_TRACE:]
    return event


def _bounded(_logger: object, _method: str, event: Event) -> Event:
    for key, value in list(event.items()):
        if key in {"exception", "_record", "_from_structlog"}:
            continue
        event[key] = SECRET if redact.is_private(key) and value else _value(value, 0)
    return event


def _value(value: object, depth: int) -> object:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth < MAX_DEPTH and isinstance(value, dict):
        return {
            clean(str(key), 100): SECRET if redact.is_private(str(key)) else _value(item, depth + 1)
            for key, item in list(value.items())[:50]
        }
    if depth < MAX_DEPTH and isinstance(value, (list, tuple, set, frozenset)):
        return [_value(item, depth + 1) for item in list(value)[:50]]
    return clean(value if isinstance(value, str) else str(value))
