"""Request heads: strict parsing, and the head for an upstream.

The grammar is RFC 9112 sections 2, 3, 5 and 6 without its ambiguous options: a request that two parsers could
read differently is refused with 400 and its connection closed.
"""

from __future__ import annotations

import re
from typing import Final

from dispatcher.proxy.edge.http import field_names
from dispatcher.proxy.edge.http.bearer import read_bearer
from dispatcher.proxy.edge.http.field_names import REQUEST_NAMES, BadHead
from dispatcher.proxy.edge.http.fields import (
    COMPILED,
    MAX_DIGITS,
    connection_options,
    read_fields,
    scan_fields,
    without_named,
)

SAFE: Final = 1  # RFC 9110, 9.2.1
IDEMPOTENT: Final = 2  # RFC 9110, 9.2.2
SILENT: Final = 4  # without a visible result

#: Methods that are passed on, of the IANA registry.  CONNECT would make a tunnel, TRACE an echo of credentials.
METHODS: Final = {
    b"GET": SAFE | IDEMPOTENT,
    b"HEAD": SAFE | IDEMPOTENT,
    b"POST": 0,
    b"PUT": IDEMPOTENT,
    b"DELETE": IDEMPOTENT,
    b"PATCH": 0,
    b"OPTIONS": SAFE | IDEMPOTENT | SILENT,
    b"QUERY": SAFE | IDEMPOTENT,
    b"PROPFIND": SAFE | IDEMPOTENT,
    b"SEARCH": SAFE | IDEMPOTENT,
    b"REPORT": SAFE | IDEMPOTENT,
    **dict.fromkeys(
        (
            *(b"ACL", b"BASELINE-CONTROL", b"BIND", b"CHECKIN", b"CHECKOUT", b"COPY", b"LABEL", b"LINK"),
            *(b"MERGE", b"MKACTIVITY", b"MKCALENDAR", b"MKCOL", b"MKREDIRECTREF", b"MKWORKSPACE", b"MOVE"),
            *(b"ORDERPATCH", b"PROPPATCH", b"REBIND", b"UNBIND", b"UNCHECKOUT", b"UNLINK", b"UNLOCK", b"UPDATE"),
            *(b"UPDATEREDIRECTREF", b"VERSION-CONTROL"),
        ),
        IDEMPOTENT,
    ),
    b"LOCK": 0,
}
_VERSIONS: Final = {b"HTTP/1.1": 1, b"HTTP/1.0": 0}
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_hosts: set[bytes] = set()  # valid ones, seen before
_MAX_HOSTS: Final = 512
_MAX_HOST: Final = 64
_ABSOLUTE: Final = re.compile(rb"https?://([^/?]+)([/?].*)?", re.IGNORECASE)
#: Visible ASCII without ``#``; percent-encoding is the application's business.
_TARGET_BYTES: Final = bytes(byte for byte in range(0x21, 0x7F) if byte != 0x23)

NO_BODY: Final = 0
CHUNKED: Final = -1


class Request:
    """One request head, parsed.

    :ivar target: origin-form, byte for byte; :ivar version: minor version of HTTP/1.
    :ivar lines: the lines to pass on unchanged, each with its CRLF.
    :ivar fields: values by kind, of the special ones.
    :ivar length: bytes of body, `NO_BODY` or `CHUNKED`; :ivar close: the connection ends after this exchange.
    :ivar framed: has fields about body or connection.
    :ivar by_hand: a navigation that is not a prefetch; :ivar machine: a prefetch.
    :ivar watched: an upgrade, or the script of a service worker: its origin matters.
    :ivar bearer: SHA-256 of its API token, empty without one.
    :ivar upgrade: asks for a WebSocket; :ivar expects: waits for ``100 Continue``; :ivar size: bytes of the head.
    """

    method: bytes
    target: bytes
    version: int
    traits: int
    host: bytes
    lines: bytes
    fields: dict[int, bytes]
    length: int
    close: bool
    upgrade: bool
    expects: bool
    framed: bool
    watched: bool
    by_hand: bool
    machine: bool
    bearer: bytes
    size: int

    def start(self, line: bytes) -> None:
        """Take a request line; `fields` are there already.

        :raises BadHead: it is invalid or refused.
        """
        try:
            method, target, version = line.split(b" ")
            self.version = _VERSIONS[version]
            self.traits = METHODS[method]
        except (ValueError, KeyError):
            raise _bad_start(line) from None
        self.method = method
        self.target = target
        if target[:1] != b"/" or target.translate(None, _TARGET_BYTES):
            self.target = _other_target(self, target)

    def navigation(self) -> bool:
        """Whether a person's browser shows the answer as a page: by Fetch Metadata, else by `Accept`."""
        if self.bearer or self.method not in {b"GET", b"HEAD"}:
            return False
        mode = self.fields.get(field_names.SEC_FETCH_MODE)
        return self.looks_like_page() if mode is None else mode == b"navigate"

    def looks_like_page(self) -> bool:
        """Whether it is a navigation by what browsers send over plain HTTP, where there is no Fetch Metadata."""
        return field_names.UPGRADE_INSECURE in self.fields or self.wants_html()

    def wants_html(self) -> bool:
        """Whether an error is better shown as a page than as a problem document."""
        # `in` costs an exception in CPython
        return not self.bearer and self.fields.get(field_names.ACCEPT, b"").find(b"text/html") >= 0

    def path(self) -> bytes:
        """Return the target without its query."""
        return self.target.partition(b"?")[0]


def parse_request(head: bytes, max_fields: int) -> Request:
    """Parse a head: everything up to and including the empty line.

    :raises BadHead: it breaks the grammar, or has one of the refused forms.
    """
    begin = head.find(b"\r\n") + 2
    if COMPILED:
        read = scan_fields(head, begin, max_fields, REQUEST_NAMES)
    else:
        read = read_fields(head, begin, max_fields, REQUEST_NAMES)
    request = Request()
    request.size = len(head)
    fields: dict[int, bytes] = {}
    kinds = 0
    for kind, value in read.special:
        kinds |= 1 << kind
        if kind in fields:
            fields[kind] += (b"; " if kind == field_names.COOKIE else b", ") + value
        else:
            fields[kind] = value
    request.lines = read.lines
    request.fields = fields
    request.start(head[: begin - 2])
    host = fields.get(field_names.HOST)
    if host is None:
        if request.version:
            raise BadHead("no Host header")
        host = b""
    elif host not in _hosts:
        _check_host(host)
    request.host = host
    request.length = NO_BODY
    request.upgrade = request.expects = False
    request.close = not request.version
    request.framed = bool(kinds & _FRAMING)
    if request.framed:
        _frame(request)
    request.bearer = b""
    if kinds & 1 << field_names.AUTHORIZATION:
        request.bearer = read_bearer(fields[field_names.AUTHORIZATION])
        if request.bearer:
            request.lines = without_named(request.lines, _AUTHORIZATION)
    request.machine = bool(kinds & 1 << field_names.SEC_PURPOSE)
    request.by_hand = not request.machine and request.navigation()
    request.watched = request.upgrade or bool(kinds & 1 << field_names.SERVICE_WORKER)
    return request


#: The kinds of fields about body and connection.
_FRAMING: Final = (
    1 << field_names.CONTENT_LENGTH
    | 1 << field_names.TRANSFER_ENCODING
    | 1 << field_names.CONNECTION
    | 1 << field_names.EXPECT
    | 1 << field_names.TE
)


_AUTHORIZATION: Final = frozenset({b"authorization"})


def _check_host(host: bytes) -> None:
    if not _HOST.fullmatch(host):
        raise BadHead("an invalid Host header, or more than one")
    if len(_hosts) >= _MAX_HOSTS:
        _hosts.clear()
    if len(host) <= _MAX_HOST:
        _hosts.add(host)


def _bad_start(line: bytes) -> BadHead:
    """Return the reason why a request line is refused."""
    parts = line.split(b" ")
    if len(parts) != 3:
        return BadHead("an invalid request line")
    method, _, version = parts
    if version not in _VERSIONS:
        if re.fullmatch(rb"HTTP/[0-9]\.[0-9]", version):
            return BadHead("an HTTP version other than 1.0 and 1.1", 505)
        return BadHead("an invalid HTTP version")
    if _TOKEN.fullmatch(method) and method == method.upper():
        return BadHead("a method that is not served here", 405 if method in {b"CONNECT", b"TRACE"} else 501)
    return BadHead("an invalid method")


def _other_target(request: Request, target: bytes) -> bytes:
    """Return the origin-form of a target in another form (RFC 9112, 3.2)."""
    if not target or target.translate(None, _TARGET_BYTES):
        raise BadHead("an invalid character in the request target")
    if target == b"*" and request.method == b"OPTIONS":
        return target
    match = _ABSOLUTE.fullmatch(target)
    if not match:
        raise BadHead("a request target that is not a path")
    # RFC 9112, 3.2.2: absolute-form must be accepted.  It must name the same host as Host, or two readers differ.
    if match[1].lower() != request.fields.get(field_names.HOST, b"").lower():
        raise BadHead("a request target of another host")
    rest = match[2] or b"/"
    return rest if rest[:1] == b"/" else b"/" + rest


def _frame(request: Request) -> None:
    """Decide where the body ends (RFC 9112, 6.3) and whether the connection persists (9.3)."""
    fields = request.fields
    if field_names.TRANSFER_ENCODING in fields:
        if field_names.CONTENT_LENGTH in fields:
            raise BadHead("both Transfer-Encoding and Content-Length")
        if not request.version:
            raise BadHead("Transfer-Encoding in HTTP/1.0")
        coding = fields[field_names.TRANSFER_ENCODING].lower()
        if coding != b"chunked":
            raise BadHead("a Transfer-Encoding other than chunked", 400 if b"chunked" in coding else 501)
        request.length = CHUNKED
    elif field_names.CONTENT_LENGTH in fields:
        text = fields[field_names.CONTENT_LENGTH]
        if not text.isdigit() or len(text) > MAX_DIGITS:
            raise BadHead("an invalid Content-Length, or more than one")
        request.length = int(text)
    if field_names.CONNECTION in fields:
        options = connection_options(fields[field_names.CONNECTION])
        if b"close" in options:
            request.close = True
        elif not request.version and b"keep-alive" in options:
            request.close = False
        if (
            b"upgrade" in options
            and field_names.UPGRADE in fields
            and request.version
            and request.method == b"GET"
        ):
            request.upgrade = fields[field_names.UPGRADE].lower() == b"websocket"
            if request.upgrade and request.length:
                raise BadHead("a body with an upgrade")
        extra = options - _ORDINARY_OPTIONS
        if extra:
            request.lines = without_named(request.lines, extra)
    if field_names.EXPECT in fields and request.version:
        if fields[field_names.EXPECT].lower() != b"100-continue":
            raise BadHead("an expectation that cannot be met", 417)
        request.expects = request.length != NO_BODY


_ORDINARY_OPTIONS: Final = frozenset({b"", b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings"})


def upstream_head(
    request: Request, host: bytes, cookie: bytes, remote: bytes, scheme: bytes, identity: bytes, request_id: bytes
) -> bytes:
    """Return the head for an upstream.

    :param cookie: value of the Cookie field, already without the dispatcher's own; empty for none.
    :param remote: the client's address; :param identity: lines about the user, each ended by CRLF.
    """
    cookie_line = b"Cookie: " + cookie + b"\r\n" if cookie else b""
    framing = _framing_lines(request)
    return b"".join(
        [
            request.method,
            b" ",
            request.target,
            b" HTTP/1.1\r\nHost: ",
            host,
            b"\r\nX-Forwarded-For: ",
            remote,
            b"\r\nX-Forwarded-Host: ",
            host,
            b"\r\nX-Forwarded-Proto: ",
            scheme,
            b"\r\nVia: 1.1 dispatcher\r\n" if request.version else b"\r\nVia: 1.0 dispatcher\r\n",
            identity,
            request.lines,
            cookie_line,
            framing,
            b"X-Request-ID: ",
            request_id,
            b"\r\n\r\n",
        ]
    )


#: What the portal reads of a client's fields, besides `Cookie`.
_PORTAL_FIELDS: Final = frozenset(
    {
        *(b"accept", b"content-type", b"origin", b"user-agent"),
        *(b"sec-fetch-dest", b"sec-fetch-mode", b"sec-fetch-site"),
    }
)
_PORTAL_PREFIX: Final = b"x-dispatcher-"  # the edge's own
MAX_PORTAL_FIELDS: Final = 8192
_BLANKS: Final = re.compile(rb"[ \t]+")


def portal_lines(lines: bytes) -> bytes:
    """Return the lines for the portal: the fields that it reads, each run of blanks as one space.

    Its server and its framework take time by the square of such a run, and of what they parse unasked.

    :raises BadHead: more than `MAX_PORTAL_FIELDS` bytes (431).
    """
    kept: list[bytes] = []
    size = 0
    for line in lines.splitlines(True):
        name, _, value = line.partition(b":")
        known = name.lower()
        if known in _PORTAL_FIELDS:
            size += len(line)
            kept.append(name + b": " + _BLANKS.sub(b" ", value.strip(b" \t\r\n")) + b"\r\n")
        elif known.startswith(_PORTAL_PREFIX):
            kept.append(line)
    if size > MAX_PORTAL_FIELDS:
        raise BadHead(f"more than {MAX_PORTAL_FIELDS} bytes in the header fields that the sign-in pages read", 431)
    return b"".join(kept)


def _framing_lines(request: Request) -> bytes:
    """Return the lines about body and connection."""
    if not request.framed:
        return b""
    lines = b""
    if request.length > 0:
        lines = b"Content-Length: %d\r\n" % request.length
    elif request.length == CHUNKED:
        lines = b"Transfer-Encoding: chunked\r\n"
    elif field_names.CONTENT_LENGTH in request.fields:
        lines = b"Content-Length: 0\r\n"
    if request.expects:
        lines += b"Expect: 100-continue\r\n"
    if request.upgrade:
        lines += b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    elif b"trailers" in request.fields.get(field_names.TE, b"").lower():
        lines += b"Connection: TE\r\nTE: trailers\r\n"
    return lines
