"""The session's token in a request's Cookie field."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from dispatcher.proxy.edge.http.cookie import split_cookie

_TOKEN: Final = re.compile(rb"[\x21-\x7e]{16,256}")


class SessionCookie:
    """The last Cookie field of a connection and its meaning: browsers send the same one repeatedly.

    :ivar field: the field's value; :ivar digest: SHA-256 of the token, empty without one.
    :ivar others: the field without the dispatcher's own cookies, for agents.
    """

    __slots__ = ("_name", "_token", "digest", "field", "others")

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._token: bytes | None = None
        self.field = self.digest = self.others = b""

    def read(self, field: bytes) -> None:
        """Read a Cookie field."""
        token, self.others = split_cookie(field, self._name)
        self.field = field
        if token != self._token:  # the other cookies change more often
            self._token = token
            self.digest = hashlib.sha256(token).digest() if token and _TOKEN.fullmatch(token) else b""
