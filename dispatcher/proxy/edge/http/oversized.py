"""Heads above `proxy.head_bytes`: what a browser is told, and how it gets rid of the cookies that caused it.

Applications on one host share its cookies.  Once these are larger than the limit, every request is refused, the
sign-in's too, and no page could help: so the refusal itself expires them.
"""

from __future__ import annotations

import re
from typing import Final

from dispatcher.proxy.cookies import OWN_NAMES

MAX_NAMES: Final = 100  # cookies that one answer expires
_MAX_DIRECTORIES: Final = 4  # of the path, beside the root, whose cookies are expired
_MAX_DIRECTORY: Final = 256
_MAX_DOMAIN: Final = 253
_MAX_LINES: Final = 32768  # bytes of all lines

_FIELD: Final = re.compile(rb"\r\n(host|cookie|accept|sec-fetch-mode):[ \t]*([^\r\n]*)", re.IGNORECASE)
_NAME: Final = re.compile(rb"(?:^|;)[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]{1,256})=")
_PATH: Final = re.compile(rb"[A-Z]+ (/[!-:<-~]*)")  # a semicolon would end the attribute
_HOST_NAME: Final = re.compile(rb"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]*[A-Za-z][A-Za-z0-9-]*)+")
_OWN: Final = frozenset(name.lower().encode() for name in OWN_NAMES)


class Oversized:
    """The part of a head that was read.

    :ivar page: a browser's navigation; :ivar names: of the cookies to expire, where cookies are the larger part.
    """

    def __init__(self, part: bytes) -> None:
        fields: dict[bytes, bytes] = {}
        for name, value in _FIELD.findall(part):
            fields.setdefault(name.lower(), value)
        cookie = fields.get(b"cookie", b"")
        mode, accept = fields.get(b"sec-fetch-mode"), fields.get(b"accept")
        if mode is not None:
            self.page = mode == b"navigate"
        else:
            # Some browsers send cookies first: then nothing else may have been read.
            self.page = b"cookie" in fields if accept is None else b"text/html" in accept
        self.names: list[bytes] = []
        # A long link of another site must not cost a person what the applications keep in cookies.
        if self.page and len(cookie) > len(part) // 2:
            found = dict.fromkeys(name for name in _NAME.findall(cookie) if name.lower() not in _OWN)
            self.names = list(found)[:MAX_NAMES]
        start = _PATH.match(part)
        self._path = start[1].partition(b"?")[0] if start else b"/"
        self._host = fields.get(b"host", b"").partition(b":")[0]

    def lines(self, domain: bytes) -> bytes:
        """Return the lines that expire the cookies.

        A browser expires a cookie only by its own path and domain, which it does not send: these are the host, the
        domain that it may share with others, the root and the directories above the target.

        :param domain: of the agents' hosts, empty where agents share a host.
        """
        domain = domain or self._host
        places = [b"; Path=/"]
        if len(domain) <= _MAX_DOMAIN and _HOST_NAME.fullmatch(domain):
            places.append(b"; Path=/; Domain=" + domain)
        end = 0
        for _ in range(_MAX_DIRECTORIES):
            end = self._path.find(b"/", end + 1)
            if not 0 < end <= _MAX_DIRECTORY:
                break
            places.append(b"; Path=" + self._path[:end])
        lines = b""
        for place in places:
            for name in self.names:
                secure = b"; Secure" if name[:2] == b"__" else b""  # without it a browser ignores such a name
                lines += b"Set-Cookie: " + name + b"=; Max-Age=0" + place + secure + b"\r\n"
                if len(lines) > _MAX_LINES:
                    return lines
        return lines
