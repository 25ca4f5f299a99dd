"""Answers of upstreams: strict parsing, and the head for the client; `net.exchange` adds the edge's own fields.

An agent is not trusted to frame its answers well.  Any answer that could desynchronise this connection or the
client's (RFC 9112, 6.3 and 11.1, response splitting) raises `BadHead`; the client then gets 502.
"""

from __future__ import annotations

import calendar
import re
import time
from typing import Final

from dispatcher.proxy.cookies import OWN_NAMES
from dispatcher.proxy.edge.http import field_names
from dispatcher.proxy.edge.http.field_names import AGENT_NAMES, RESPONSE_NAMES, SHARED_NAMES, BadHead, Names
from dispatcher.proxy.edge.http.fields import (
    COMPILED,
    FIELD_BYTES,
    KEEP_ALIVE,
    MAX_DIGITS,
    connection_options,
    read_fields,
    scan_fields,
    without_named,
)

_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: .*)?")
_PROTOCOL: Final = b"HTTP/1."
_BARE_END: Final = re.compile(rb"\n\r?\n")  # the end of a head for parsers that accept a bare LF
_OWN: Final = frozenset(name.lower().encode() for name in OWN_NAMES)
_DOMAIN: Final = re.compile(rb";[ \t]*domain[ \t]*(?:=[^;\r]*)?(?=[;\r]|$)", re.IGNORECASE)
_MAX_CACHED: Final = 512
_MAX_CACHED_VALUE: Final = 64
_statuses: dict[bytes, tuple[int, int, bytes]] = {}
_directives: dict[bytes, bytes] = {}  # what `_for_one` returned for a value

NO_BODY: Final = 0
CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2


class Response:
    """One answer's head, parsed.

    :ivar lines: the lines to pass on, each with its CRLF, the start line for an HTTP/1.1 client first.
    :ivar length: bytes of body, `NO_BODY`, `CHUNKED` or `UNTIL_CLOSE`.
    :ivar close: the upstream connection ends after this; :ivar upgraded: 101 to a WebSocket.
    :ivar dated: there is a Date; :ivar cached: the directives of an agent's Cache-Control, and what its Expires
        says, which are then not in `lines`; without those about shared caches.
    """

    status: int
    lines: bytes
    length: int
    close: bool
    upgraded: bool
    dated: bool
    cached: bytes


class Policy:
    """Limits on the statements of agents about the origin that they share.

    :ivar guarded: the portal's prefix with a slash, as bytes, that no service worker may cover; empty when agents
        have origins of their own.
    :ivar host_only: cookies lose their ``Domain``, so that no agent sets one for a sibling.
    """

    def __init__(self, guarded: bytes = b"", *, host_only: bool = False) -> None:
        self.guarded = guarded
        self.host_only = host_only


#: For the portal, which is the dispatcher itself: it may set the dispatcher's cookies.
TRUSTED: Final[None] = None


def check_begun(part: bytearray, start: int) -> None:
    """Check a head that is not complete, so that no client waits for the rest of what cannot become one.

    :param start: where to look for the end of the head; what is before was checked.
    :raises BadHead: it does not begin as an answer does, or lines end with a bare LF.
    """
    if not part.startswith(_PROTOCOL[: len(part)]):
        raise BadHead("an invalid status line")
    if _BARE_END.search(part, start):
        raise BadHead("lines that end with a bare LF")


def parse_response(head: bytes, max_fields: int, method: bytes, policy: Policy | None) -> Response:
    """Parse an answer's head: everything up to and including the empty line.

    :param method: of the request, as the answer to HEAD has no body whatever its head says.
    :raises BadHead: it is invalid.
    """
    begin = head.find(b"\r\n") + 2
    first = head[: begin - 2]
    start = _statuses.get(first)
    if start is None:
        start = _learn_status(first)
    version, status, first = start
    names = RESPONSE_NAMES if policy is None else SHARED_NAMES if policy.guarded else AGENT_NAMES
    read = scan_fields(head, begin, max_fields, names) if COMPILED else read_fields(head, begin, max_fields, names)
    response = Response()
    response.status = status
    response.dated = False
    response.cached = b""
    lines = first + read.lines
    length = UNTIL_CLOSE
    options: frozenset[bytes] | None = None
    allowed = True
    repeated = False
    chunked = False
    cached: list[bytes] = []
    date = b""
    expires: bytes | None = None
    response.upgraded = False
    for kind, value in read.special:
        if kind == field_names.DATE:
            response.dated = True
            date = value
        elif kind == field_names.CONTENT_TYPE:
            if policy is not None and policy.guarded and value.lower().find(b"script") >= 0:
                # A copy in the browser's cache must not serve for a service worker that is refused here:
                # browsers may take the script from there (Service Workers, "Update", updateViaCache).
                lines += b"Vary: Service-Worker\r\n"
        elif kind == field_names.ANSWER_LENGTH:
            # A leading zero is rewritten as well: some read it as octal.
            if (
                length != UNTIL_CLOSE
                or not value.isdigit()
                or len(value) > MAX_DIGITS
                or value[:1] == b"0" != value
            ):
                length = _same_length(length, value)
                repeated = True
            else:
                length = int(value)
        elif kind == field_names.CONNECTION:
            options = connection_options(value) if options is None else options | connection_options(value)
        elif kind == field_names.TRANSFER_ENCODING:
            if chunked or value.lower() != b"chunked":
                raise BadHead("a Transfer-Encoding other than chunked")
            chunked = True
        elif kind == field_names.UPGRADE:
            response.upgraded = status == 101 and value.lower() == b"websocket"
        elif kind == field_names.CACHE_CONTROL:
            cached.append(value)
        elif kind == field_names.EXPIRES:
            expires = value
        elif policy is not None:
            if kind == field_names.SET_COOKIE:
                if sets_own_cookie(value) or (policy.host_only and _DOMAIN.search(value)):
                    allowed = False
            elif kind == field_names.CLEAR_SITE_DATA or (policy.guarded and widens(value, policy.guarded)):
                allowed = False
    if policy is not None and not allowed:
        lines = b"".join([_allowed(line, policy, names) for line in lines.splitlines(True)])
    if cached:
        value = b",".join(cached)
        own = _directives.get(value)
        response.cached = _for_one(value) if own is None else own
    if expires is not None and not _LIFETIME.search(response.cached):
        response.cached += (b", " if response.cached else b"") + b"max-age=%d" % _lifetime(expires, date)
    if options is None:
        response.close = not version
    elif options is KEEP_ALIVE:
        response.close = False
    else:
        response.close = b"close" in options or (not version and b"keep-alive" not in options)
        lines = without_named(lines, options - _ORDINARY_OPTIONS)
    if chunked:
        if length != UNTIL_CLOSE:
            raise BadHead("both Transfer-Encoding and Content-Length")
        if not version:
            raise BadHead("Transfer-Encoding in HTTP/1.0")
        length = CHUNKED
    if repeated:
        lines = without_named(lines, _LENGTH_NAME) + b"Content-Length: %d\r\n" % length
    if status < 200 or status == 204:
        # Neither field may be there (RFC 9112, 6.1 and RFC 9110, 8.6), and there is no body (RFC 9112, 6.3).
        if chunked or length > 0:
            if status < 200:
                raise BadHead("Transfer-Encoding or Content-Length in an informational answer")
            response.close = True  # what follows would be taken for the next answer
        lines = without_named(lines, _LENGTH_NAME)
        length = NO_BODY
    if status == 304 or method == b"HEAD":
        length = NO_BODY
    elif length == UNTIL_CLOSE:
        response.close = True
    response.lines = lines
    response.length = length
    return response


def _same_length(length: int, value: bytes) -> int:
    """Return the length that several equal values give (RFC 9112, 6.3), `length` one of them if it is known."""
    parts = [part.strip(b" \t") for part in value.split(b",")]
    if length != UNTIL_CLOSE:
        parts.append(b"%d" % length)
    if not all(part.isdigit() and len(part) <= MAX_DIGITS for part in parts) or len({int(p) for p in parts}) > 1:
        raise BadHead("an invalid Content-Length, or different ones")
    return int(parts[0])


def _for_one(value: bytes) -> bytes:
    """Return the directives of Cache-Control (RFC 9111, 5.2.2) but those about who may keep an answer.

    Quoted arguments are rare: of ``no-cache="set-cookie"`` the name is left, which is stricter.
    """
    kept = []
    for text in value.split(b","):
        directive = text.strip(b" \t")
        name = directive.partition(b"=")[0].lower()
        if name == b"no-cache":
            directive = name
        if name not in _SHARING and _DIRECTIVE.fullmatch(directive):
            kept.append(directive)
    own = b", ".join(kept)
    if len(value) < _MAX_CACHED_VALUE:
        if len(_directives) >= _MAX_CACHED:
            _directives.clear()
        _directives[value] = own
    return own


def _lifetime(expires: bytes, date: bytes) -> int:
    """Return for how many seconds an answer is fresh by `Expires`, 0 if it is invalid or in an obsolete form.

    Some shared caches obey `Expires` where they ignore ``private``, so it is passed on as ``max-age``.
    """
    end = _time(expires)
    begin = _time(date)
    return 0 if end is None else max(0, end - (int(time.time()) if begin is None else begin))


def _time(text: bytes) -> int | None:
    """Return the seconds of an HTTP date in its fixed form (RFC 9110, 5.6.7), None if it has another."""
    match = _DATE.fullmatch(text)
    if not match or match[2] not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(match[index]) for index in (1, 3, 4, 5, 6))
    return calendar.timegm((year, _MONTHS.index(match[2]) + 1, day, hour, minute, second))


_LIFETIME: Final = re.compile(rb"(?:^|, )(?:max-age|no-store|no-cache)(?:=|,|$)", re.IGNORECASE)
_DATE: Final = re.compile(rb"[A-Z][a-z]{2}, (\d\d) ([A-Z][a-z]{2}) ([1-9]\d{3}) (\d\d):(\d\d):(\d\d) GMT")
_MONTHS: Final = (
    *(b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun"),
    *(b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"),
)
_DIRECTIVE: Final = re.compile(rb"[0-9A-Za-z-]+(?:=[0-9A-Za-z-]+)?")
_SHARING: Final = frozenset({b"public", b"private", b"s-maxage"})
_LENGTH_NAME: Final = frozenset({b"content-length"})
_ORDINARY_OPTIONS: Final = frozenset({b"", b"close", b"keep-alive", b"upgrade"})


def _allowed(line: bytes, policy: Policy, names: Names) -> bytes:
    """Return a line of an answer as far as an upstream may set it for the origin."""
    name, _, value = line.partition(b":")
    kind = names.known.get(name)
    value = value.strip(b" \t\r\n")
    if kind == field_names.SET_COOKIE:
        return b"" if sets_own_cookie(value) else _DOMAIN.sub(b"", line) if policy.host_only else line
    if kind == field_names.SERVICE_WORKER_ALLOWED:
        return b"" if policy.guarded and widens(value, policy.guarded) else line
    return b"" if kind == field_names.CLEAR_SITE_DATA else line


def _learn_status(line: bytes) -> tuple[int, int, bytes]:
    match = _STATUS.fullmatch(line)
    if not match or line.translate(None, FIELD_BYTES):
        raise BadHead("an invalid status line")
    status = int(match[2])
    # The version is this connection's own (RFC 9112, 2.3).
    learned = int(match[1]), status, b"HTTP/1.1" + line[8:] + (b" \r\n" if len(line) == 12 else b"\r\n")
    if len(line) < _MAX_CACHED_VALUE:
        if len(_statuses) >= _MAX_CACHED:
            _statuses.clear()
        _statuses[line] = learned
    return learned


def sets_own_cookie(value: bytes) -> bool:
    """Whether a `Set-Cookie` value would set one of the dispatcher's cookies, in any spelling.

    A browser takes ``=name=x`` for a cookie without a name and sends ``name=x`` back, and it ignores blanks
    around names; the comparison without case affects no legitimate cookie.
    """
    if value.lower().find(b"dispatcher") < 0:
        return False
    pair = value.partition(b";")[0].lstrip(b"= \t")
    return pair.partition(b"=")[0].rstrip(b" \t").lower() in _OWN


def covers(directory: bytes, guarded: bytes) -> bool:
    """Whether a service worker with that scope would see what lies under `guarded`."""
    return guarded.startswith(directory)


def widens(value: bytes, guarded: bytes) -> bool:
    """Whether a `Service-Worker-Allowed` value lets a scope cover `guarded`.

    Only a plain absolute path is accepted; any other value counts as widening.
    """
    plain = (
        value[:1] == b"/" and value[:2] != b"//" and not any(odd in value for odd in (b"..", b"%", b"\\", b"\t"))
    )
    return not plain or covers(value, guarded)


def client_head(response: Response, additions: bytes) -> bytes:
    """Return the head for the client; `additions` are the edge's own lines, each ended by CRLF."""
    return b"".join([response.lines, additions, b"\r\n"])
