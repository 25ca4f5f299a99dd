"""Values that plugins hand over, checked once, where they come in: types, sizes, encodings.

Each function returns a plain copy, its texts cleaned, or raises `ValueError` with the field, the value found and
the value expected.  What is checked here can be stored, sent as JSON and shown.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from dispatcher.common.contained import MAX_TEXT, text
from dispatcher.common.plain import plain
from dispatcher.plugin.model import BackendState, Capability, Endpoint, Finding, Handle, Level, Observation, Usage
from dispatcher.plugin.names import printable

MAX_ITEMS = 1000  # of a list of texts or findings
MAX_NAME = 512  # characters
MAX_REASON = 1000  # characters of why an app ended
MAX_PATH = 4096  # bytes
MAX_HANDLE = 65536  # characters of a handle as JSON
_MAX_ID = 2**32 - 1  # of a user; it is none itself
_MAX_NUMBER = 2**53  # beyond it JSON numbers lose digits
_KINDS = {"unix", "tcp", "vsock"}

_T = TypeVar("_T")


def handle(value: object) -> Handle:
    """Return a handle that can be stored."""
    given = _of_type(value, Handle, "a Handle")
    found = Handle(**{field.name: plain(getattr(given, field.name)) for field in fields(Handle)})
    for name in ("provider", "agent", "name"):
        _check(f"{name}", getattr(found, name), _is_name, f"a text of at most {MAX_NAME} characters")
    _check("data", found.data, lambda data: isinstance(data, Mapping), "a mapping")
    try:
        stored = found.to_json()
    except Exception as error:
        raise ValueError(f"data is not JSON: {text(error, 200)}") from error
    if len(stored) > MAX_HANDLE:
        raise ValueError(f"data has {len(stored)} characters as JSON, expected at most {MAX_HANDLE}")
    if "\\ud" in stored and not _encodable(json.dumps(json.loads(stored), ensure_ascii=False)):
        raise ValueError("data has a text that is not Unicode")
    return found


def observation(value: object) -> Observation:
    """Return an observation whose texts are clean."""
    given = _of_type(value, Observation, "an Observation")
    found = Observation(**{field.name: _known(getattr(given, field.name)) for field in fields(Observation)})
    _check("state", found.state, lambda state: isinstance(state, BackendState), "a BackendState")
    if found.endpoint is not None:
        found = replace(found, endpoint=_endpoint(found.endpoint))
    _optional("owner_uid", found.owner_uid, lambda uid: _whole(uid, _MAX_ID), "a user id")
    _optional("started_at", found.started_at, _number, "Unix time in seconds")
    _check("spec_hash", found.spec_hash, _is_short, f"a text of at most {MAX_NAME} characters")
    _check("exit_reason", found.exit_reason, _is_text, "a text")
    _check("detail", found.detail, _is_text, "a text")
    _check("oom_kills", found.oom_kills, _is_count, "a count")
    reason, detail = (text(line, MAX_REASON).replace("\n", " ") for line in (found.exit_reason, found.detail))
    if (reason, detail) == (found.exit_reason, found.detail):
        return found
    return replace(found, exit_reason=reason, detail=detail)


def usage(value: object) -> Usage:
    """Return usage that can be added up."""
    given = _of_type(value, Usage, "a Usage")
    found = Usage(**{field.name: plain(getattr(given, field.name)) for field in fields(Usage)})
    for field in fields(Usage):
        one = _number if field.name == "cpu_seconds" else _is_count
        _optional(field.name, getattr(found, field.name), one, "a number of at least 0, or None")
    return found


def finding(value: object) -> Finding:
    """Return a finding whose texts are clean."""
    found = _of_type(value, Finding, "a Finding")
    _check("level", found.level, lambda level: isinstance(level, Level), "a Level")
    _check("what", found.what, _is_text, "a text")
    _check("fix", found.fix, _is_text, "a text")
    return Finding(level=found.level, what=text(found.what), fix=text(found.fix))


def capabilities(values: Iterable[object]) -> frozenset[Capability]:
    """Return capabilities."""
    return frozenset(several(values, Capability))


def texts(values: Iterable[object]) -> list[str]:
    """Return texts, clean."""
    return several(values, lambda value: text(_of_type(value, str, "a text"), MAX_TEXT))


def several(values: Iterable[object], check: Callable[[object], _T]) -> list[_T]:
    """Return checked values; not too many of them."""
    found = [check(value) for value in itertools.islice(values, MAX_ITEMS + 1)]
    if len(found) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} values")
    return found


def _known(value: object) -> Any:
    return value if isinstance(value, (BackendState, Endpoint)) else plain(value)


def _endpoint(value: object) -> Endpoint:
    given = _of_type(value, Endpoint, "an Endpoint", "endpoint")
    found = Endpoint(**{field.name: plain(getattr(given, field.name)) for field in fields(Endpoint)})
    _check("endpoint.kind", found.kind, lambda kind: kind in _KINDS, "unix, tcp or vsock")
    if found.kind == "unix":
        _check("endpoint.path", found.path, _is_path, "an absolute path")
        return found
    if found.kind == "tcp":
        _check("endpoint.host", found.host, _is_host, "the name or address of a host")
    else:
        _check("endpoint.cid", found.cid, lambda cid: _whole(cid, _MAX_ID), "a context id")
    most = 65535 if found.kind == "tcp" else _MAX_ID
    _check("endpoint.port", found.port, lambda port: _whole(port, most), f"a port up to {most}")
    return found


def _check(name: str, value: object, good: Callable[[Any], bool], expected: str) -> None:
    if not good(value):
        raise ValueError(f"{name} is {_shown(value)}, expected {expected}")


def _optional(name: str, value: object, good: Callable[[Any], bool], expected: str) -> None:
    if value is not None:
        _check(name, value, good, expected)


def _of_type(value: object, kind: type[_T], expected: str, name: str = "the value") -> _T:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {_shown(value)}, expected {expected}")
    return value


def _shown(value: object) -> str:
    if type(value) is int and abs(value) > 10**18:  # Python refuses to write very long ones
        return "a very large number"
    return printable(text(repr(value) if not isinstance(value, str) else value, 120), 100)


def _whole(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _MAX_NUMBER


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and _encodable(value)


def _is_count(value: object) -> bool:
    return _whole(value, _MAX_NUMBER)


def _is_name(value: object) -> bool:
    return _is_short(value) and bool(value) and "\0" not in value  # type: ignore[operator]


def _is_path(value: object) -> bool:
    return (
        isinstance(value, str)
        and value.startswith("/")
        and "\0" not in value
        and _encodable(value)
        and len(value.encode()) <= MAX_PATH
    )


def _is_host(value: object) -> bool:
    return (
        isinstance(value, str)
        and 0 < len(value) <= 253
        and value.isascii()
        and value.isprintable()
        and " " not in value
    )


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
