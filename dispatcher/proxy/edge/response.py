"""Answers of upstreams: strict parsing, and the head that goes to the client.  Pure: bytes in, bytes out.

An agent is not trusted to frame its answers well.  Whatever could make this connection or the client's lose its
place (RFC 9112, 6.3 and 11.1, response splitting) raises `BadHead`; the client then gets 502.
"""

from __future__ import annotations

import re

from dispatcher.proxy.cookies import OWN_NAMES
from dispatcher.proxy.edge import headers
from dispatcher.proxy.edge.headers import FIELD_BYTES, RESPONSE_NAMES, BadHead

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: .*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_OWN = frozenset(name.lower().encode() for name in OWN_NAMES)
_DOMAIN = re.compile(rb";[ \t]*domain[ \t]*(?:=[^;]*)?(?=;|$)", re.IGNORECASE)
_MAX_CACHED = 512
_statuses: dict[bytes, tuple[int, int, bytes]] = {}

NO_BODY = 0
CHUNKED = -1
UNTIL_CLOSE = -2


class Response:
    """One answer's head, understood.

    :ivar start: the start line for an HTTP/1.1 client; :ivar lines: what is passed on.
    :ivar length: bytes of body, `NO_BODY`, `CHUNKED` or `UNTIL_CLOSE`.
    :ivar content_length: as stated (an answer to HEAD states one too), None without.
    :ivar close: the upstream connection ends after this; :ivar upgraded: 101 to a WebSocket.
    """

    __slots__ = ("close", "content_length", "dated", "length", "lines", "start", "status", "upgraded")

    status: int
    start: bytes
    lines: list[bytes]
    length: int
    content_length: int | None
    close: bool
    upgraded: bool
    dated: bool


class Policy:
    """What agents may say about the origin that they share.

    :ivar guarded: the portal's prefix with a slash, as bytes, that no service worker may cover; empty when agents
        have origins of their own.
    :ivar host_only: cookies lose their ``Domain``, so that no agent sets one for a sibling.
    """

    __slots__ = ("guarded", "host_only")

    def __init__(self, guarded: bytes = b"", *, host_only: bool = False) -> None:
        self.guarded = guarded
        self.host_only = host_only


#: For the portal, which is the dispatcher itself: it may set the dispatcher's cookies.
TRUSTED = None


def parse_response(head: bytes, max_fields: int, method: bytes, policy: Policy | None) -> Response:
    """Understand an answer's head: everything up to and including the empty line.

    :param method: of the request, as the answer to HEAD has no body whatever its head says.
    :raises BadHead: it must not be passed on.
    """
    lines = head.split(b"\r\n")
    if len(head.translate(None, FIELD_BYTES)) != 2 * len(lines) - 2:
        raise BadHead("a control character in the head")
    if len(lines) > max_fields + 3:
        raise BadHead(f"more than {max_fields} header lines")
    start = _statuses.get(lines[0])
    if start is None:
        start = _learn_status(lines[0])
    version, status, first = start
    response = Response()
    response.status = status
    response.start = first
    response.upgraded = False
    response.dated = False
    known = RESPONSE_NAMES.known
    kept: list[bytes] = []
    fields: dict[int, bytes] = {}
    for line in lines[1:-2]:
        name, colon, value = line.partition(b":")
        kind = known.get(name)
        if kind is None:
            kind = RESPONSE_NAMES.learn(name)
        if not colon:
            raise BadHead("a header line without a colon")
        if kind == 0:
            kept.append(line)
        elif kind == headers.SET_COOKIE:
            if policy is None:
                kept.append(line)
            elif not sets_own_cookie(value):
                kept.append(_DOMAIN.sub(b"", line) if policy.host_only else line)
        elif kind == headers.DATE:
            if not response.dated:
                response.dated = True
                kept.append(line)
        elif kind == headers.SERVICE_WORKER_ALLOWED:
            if policy is None or not policy.guarded or not widens(value.strip(), policy.guarded):
                kept.append(line)
        elif kind == headers.CLEAR_SITE_DATA:
            if policy is None:  # at the sign-out; an agent must not wipe the whole host
                kept.append(line)
        elif kind >= 3:
            value = value.strip(b" \t")
            fields[kind] = fields[kind] + b", " + value if kind in fields else value
        elif kind == headers.REFUSE:
            raise BadHead("a framing header spelled with an underscore")
    response.lines = kept
    _frame(response, fields, version, method)
    return response


def _learn_status(line: bytes) -> tuple[int, int, bytes]:
    match = _STATUS.fullmatch(line)
    if not match:
        raise BadHead("a bad status line")
    status = int(match[2])
    # The version is this connection's own (RFC 9112, 2.3).
    learned = int(match[1]), status, b"HTTP/1.1" + line[8:] + (b" " if len(line) == 12 else b"")
    if len(_statuses) < _MAX_CACHED and len(line) < 64:
        _statuses[line] = learned
    return learned


def _frame(response: Response, fields: dict[int, bytes], version: int, method: bytes) -> None:
    """Decide where the body ends (RFC 9112, 6.3) and whether the upstream connection persists."""
    status = response.status
    response.close = not version
    content_length = None
    if headers.CONNECTION in fields:
        options = headers.connection_options(fields[headers.CONNECTION])
        if b"close" in options:
            response.close = True
        elif not version and b"keep-alive" in options:
            response.close = False
        extra = options - _ORDINARY_OPTIONS
        if extra:
            response.lines = headers.without_named(response.lines, extra)
    chunked = False
    if headers.TRANSFER_ENCODING in fields:
        if headers.CONTENT_LENGTH in fields:
            raise BadHead("both Transfer-Encoding and Content-Length")
        if not version:
            raise BadHead("Transfer-Encoding in HTTP/1.0")
        if fields[headers.TRANSFER_ENCODING].lower() != b"chunked":
            raise BadHead("a Transfer-Encoding other than chunked")
        if status < 200 or status == 204:
            raise BadHead("Transfer-Encoding in an answer without a body")  # RFC 9112, 6.1
        chunked = True
    elif headers.CONTENT_LENGTH in fields:
        text = fields[headers.CONTENT_LENGTH]
        if not _LENGTH.fullmatch(text):
            raise BadHead("a bad Content-Length, or more than one")
        content_length = int(text)
        if status < 200 or status == 204:
            if content_length:
                raise BadHead("Content-Length in an answer without a body")  # RFC 9110, 8.6
            content_length = None
    response.content_length = content_length
    if method == b"HEAD" or status < 200 or status in {204, 304}:
        response.length = NO_BODY
        if status == 101:
            response.upgraded = fields.get(headers.UPGRADE, b"").lower() == b"websocket"
    elif chunked:
        response.length = CHUNKED
    elif content_length is not None:
        response.length = content_length
    else:
        response.length = UNTIL_CLOSE
        response.close = True


_ORDINARY_OPTIONS = frozenset({b"", b"close", b"keep-alive", b"upgrade"})


def sets_own_cookie(value: bytes) -> bool:
    """Whether a `Set-Cookie` value would set one of the dispatcher's cookies, however it is spelled.

    A browser takes ``=name=x`` for a cookie without a name and sends ``name=x`` back, and it ignores blanks
    around names; comparing without case costs nothing that an application may rightly want.
    """
    pair = value.partition(b";")[0].lstrip(b"= \t")
    return pair.partition(b"=")[0].rstrip(b" \t").lower() in _OWN


def covers(directory: bytes, guarded: bytes) -> bool:
    """Whether a service worker with that scope would see what lies under `guarded`."""
    return guarded.startswith(directory)


def widens(value: bytes, guarded: bytes) -> bool:
    """Whether a `Service-Worker-Allowed` value lets a scope cover `guarded`.

    Only a plain absolute path is understood; whatever a browser would have to resolve counts as widening.
    """
    plain = (
        value[:1] == b"/" and value[:2] != b"//" and not any(odd in value for odd in (b"..", b"%", b"\\", b"\t"))
    )
    return not plain or covers(value, guarded)


def client_head(response: Response, additions: bytes) -> bytes:
    """Return the head for the client; `additions` are the edge's own lines, each ended by CRLF."""
    if response.lines:
        return response.start + b"\r\n" + b"\r\n".join(response.lines) + b"\r\n" + additions + b"\r\n"
    return response.start + b"\r\n" + additions + b"\r\n"
