"""Distinguished names as servers write them (RFC 4514, section 3).  Pure.

`parse_dn` of ldap3 refuses some of them: a `#` or `=` inside a value needs no backslash.
"""

from __future__ import annotations

import re

_TYPE = r"(?:[A-Za-z][A-Za-z0-9-]*|[0-9]+(?:\.[0-9]+)*)"
_VALUE = r"(?:\\(?:[0-9A-Fa-f]{2}|[^0-9A-Fa-f])|[^,+\\\";<>\0])+"
_PART = rf"\s*{_TYPE}\s*={_VALUE}"
_DN = re.compile(rf"{_PART}(?:[,+]{_PART})*")
_FIRST = re.compile(r"(?:\\.|[^,\\])*", re.DOTALL)
_PAIR = re.compile(r"(?:\\.|[^+\\])+", re.DOTALL)
_ESCAPED = re.compile(rb"\\([0-9A-Fa-f]{2}|.)", re.DOTALL)


def is_dn(text: str) -> bool:
    """Whether a text is a distinguished name."""
    return _DN.fullmatch(text) is not None


def first_values(dn: str, attribute: str) -> set[str]:
    """Return the values of an attribute in the first part of a name, which may have several (`cn=x+uid=y`)."""
    found = set()
    for pair in _PAIR.findall(_FIRST.match(dn)[0]):  # type: ignore[index]
        key, _, value = pair.partition("=")
        if key.strip().lower() == attribute.lower():
            found.add(_ESCAPED.sub(_unescape, value.encode()).decode("utf-8", "replace"))
    return found


def _unescape(found: re.Match[bytes]) -> bytes:
    text = found[1]
    return bytes.fromhex(text.decode()) if len(text) == 2 else text
