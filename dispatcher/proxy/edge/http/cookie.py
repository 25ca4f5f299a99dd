"""Separation of the dispatcher's own cookies from those of the agents."""

from __future__ import annotations

from typing import Final

from dispatcher.proxy.cookies import OWN_NAMES

_OWN: Final = frozenset(name.encode() for name in OWN_NAMES)


def split_cookie(value: bytes, session_name: bytes) -> tuple[bytes | None, bytes]:
    """Return the session's token, and the Cookie value for an agent: the other cookies, byte for byte.

    The token is None when there is no session cookie, or more than one: a sibling origin or an agent's page may
    have added the second, and it cannot be told which is right.
    """
    token: bytes | None = None
    count = position = 0
    rest: list[bytes] = []
    size = len(value)
    found = value.find(b"dispatcher")
    while found >= 0:
        begin = value.rfind(b";", position, found) + 1 or position
        end = value.find(b";", found)
        if end < 0:
            end = size
        name, _, content = value[begin:end].partition(b"=")
        name = name.strip(b" \t")
        if name in _OWN:
            if begin > position:
                rest.append(value[position : begin - 1])
            position = end + 1
            if name == session_name:
                token = content.strip(b" \t")
                count += 1
        found = value.find(b"dispatcher", end)
    if not position:
        return None, value
    if position <= size:
        rest.append(value[position:])
    return token if count == 1 else None, b";".join(rest).strip(b" \t")
