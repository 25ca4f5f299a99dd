"""Plain copies of values that plugins hand over: instances of Python's own types, so that no code of a plugin runs
when they are compared, stored or shown later.  `numpy.float64` and `numpy.str_` are such subclasses, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

MAX_DEPTH = 50  # of tables and lists within one another

#: By type: how a value of a subclass is copied without its own methods.
_COPIES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, lambda value: bytes.__getitem__(value, slice(None))),
)


@overload
def plain(value: str) -> str: ...
@overload
def plain(value: bytes) -> bytes: ...
@overload
def plain(value: object) -> Any: ...
def plain(value: object) -> Any:
    """Return a copy of a value; other types than those of JSON, and bytes, are returned as they are.

    :raises ValueError: it has too many levels.
    """
    return _plain(value, 0)


def _plain(value: object, depth: int) -> Any:
    if value is None or type(value) is bool:
        return value
    if depth > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {_plain(key, depth + 1): _plain(each, depth + 1) for key, each in dict.items(value)}
    if isinstance(value, list):
        return [_plain(each, depth + 1) for each in list.__iter__(value)]
    if isinstance(value, tuple):
        return tuple(_plain(each, depth + 1) for each in tuple.__iter__(value))
    for kind, copy in _COPIES:
        if isinstance(value, kind):
            return value if type(value) is kind else copy(value)
    return value
