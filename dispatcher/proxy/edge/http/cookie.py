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
    count = own = 0
    rest: list[bytes] = []
    for pair in value.split(b";"):
        if b"dispatcher" not in pair:
            rest.append(pair)
            continue
        name, _, content = pair.strip(b" \t").partition(b"=")
        name = name.rstrip(b" \t")
        if name not in _OWN:
            rest.append(pair)
            continue
        own += 1
        if name == session_name:
            token = content.strip(b" \t")
            count += 1
    if not own:
        return None, value
    return token if count == 1 else None, b";".join(rest).strip(b" \t")
