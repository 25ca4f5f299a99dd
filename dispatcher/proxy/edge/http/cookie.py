"""Separation of the dispatcher's own cookies from those of the agents."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from dispatcher.proxy.cookies import OWN_NAMES

_OWN: Final = frozenset(name.encode() for name in OWN_NAMES)
_TOKEN: Final = re.compile(rb"[\x21-\x7e]{16,256}")


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


class SessionCookie:
    """The last Cookie field of a connection and its meaning: browsers send the same session repeatedly.

    :ivar field: the field's value; :ivar digest: SHA-256 of the token, empty without one.
    :ivar others: the field without the dispatcher's own cookies, for agents.
    """

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._token: bytes | None = None
        self.field = self.digest = self.others = b""

    def read(self, field: bytes) -> None:
        """Read a Cookie field."""
        if field == self.field:
            return
        token, self.others = split_cookie(field, self._name)
        self.field = field
        if token != self._token:  # the other cookies change more often
            self._token = token
            self.digest = hashlib.sha256(token).digest() if token and _TOKEN.fullmatch(token) else b""
