"""Field lines of HTTP/1.1 heads and trailers, strictly by RFC 9110 section 5 and RFC 9112 section 5.  Pure.

What two parsers could read differently is refused here once, for requests and answers alike: bare CR or LF, NUL
and other controls, folded lines, space before the colon, names that are no tokens, and names whose underscore
spelling some applications take for a framing field (WSGI and CGI do not tell ``_`` from ``-``).

Each name has a *kind*, a small number that says what the edge does with the line.  Clients and applications send
the same lines again and again: what such a line means is remembered by its exact bytes, and costs one
dictionary lookup.
"""

from __future__ import annotations

import re

Entry = tuple[int, bytes]

#: Bytes that a field value or a start line may hold: HTAB, SP, VCHAR and obs-text (RFC 9110, 5.5).
FIELD_BYTES = frozenset([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: Maps what a line must not hold to NUL.
CHECK = bytes(byte if byte in FIELD_BYTES else 0 for byte in range(256))
_MAX_CACHED = 2048
_MAX_CACHED_NAME = 64

# What becomes of a line.  Kinds from SPECIAL on are looked at one by one; their values are collected.
KEEP = 0  # passed on byte for byte
DROP = 1
REFUSE = 2  # no honest sender writes it
SPECIAL = 3

# Requests.
HOST = 3
COOKIE = 4
CONNECTION = 5
CONTENT_LENGTH = 6
TRANSFER_ENCODING = 7
EXPECT = 8
UPGRADE = 9
TE = 10
X_FORWARDED_FOR = 11
X_FORWARDED_HOST = 12
X_FORWARDED_PROTO = 13
X_REQUEST_ID = 14
# From here on a request's line is looked at and passed on as well.
LOOKED_AT = 20
ACCEPT = 20
SEC_FETCH_MODE = 21
SEC_FETCH_SITE = 22
ORIGIN = 23
SERVICE_WORKER = 24
SEC_PURPOSE = 25
SEC_FETCH_DEST = 26

# Answers.
SET_COOKIE = 30
SERVICE_WORKER_ALLOWED = 31
DATE = 32
CLEAR_SITE_DATA = 33
CONTENT_TYPE = 34

#: Fields that are about one connection only (RFC 9110, 7.6.1), besides those that `Connection` names.
_HOP_BY_HOP = dict.fromkeys(
    ("keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "proxy-authentication-info"),
    DROP,
)

#: What a client must not say of itself: who it is and where it comes from.  The edge says it, or nobody.
_IDENTITY = dict.fromkeys(
    (
        "forwarded",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "true-client-ip",
        "cf-connecting-ip",
        "fastly-client-ip",
        "client-ip",
        "x-host",
        "x-original-url",
        "x-original-uri",
        "x-original-host",
        "x-rewrite-url",
        "x-url-scheme",
        "x-scheme",
        "x-script-name",
        "remote-user",
        "remote-addr",
        "x-remote-user",
        "x-remote-groups",
        "x-authenticated-user",
        "x-auth-request-user",
        "x-auth-request-email",
        "x-webauth-user",
        "x-ssl-client-dn",
        "x-ssl-client-verify",
        "x-client-cert",
        "ssl-client-cert",
        "http2-settings",
        "proxy",  # becomes HTTP_PROXY in CGI (CVE-2016-5385)
    ),
    DROP,
)
_IDENTITY_PREFIXES = ("x-forwarded-", "x-dispatcher-")

_FRAMING = {"content-length": CONTENT_LENGTH, "transfer-encoding": TRANSFER_ENCODING, "connection": CONNECTION}

_REQUEST = {
    **_HOP_BY_HOP,
    **_IDENTITY,
    **_FRAMING,
    "host": HOST,
    "cookie": COOKIE,
    "expect": EXPECT,
    "upgrade": UPGRADE,
    "te": TE,
    "x-forwarded-for": X_FORWARDED_FOR,
    "x-forwarded-host": X_FORWARDED_HOST,
    "x-forwarded-proto": X_FORWARDED_PROTO,
    "x-request-id": X_REQUEST_ID,
    "accept": ACCEPT,
    "sec-fetch-mode": SEC_FETCH_MODE,
    "sec-fetch-site": SEC_FETCH_SITE,
    "sec-fetch-dest": SEC_FETCH_DEST,
    "sec-purpose": SEC_PURPOSE,
    "origin": ORIGIN,
    "service-worker": SERVICE_WORKER,
}

_RESPONSE = {
    **_HOP_BY_HOP,
    **_FRAMING,
    "upgrade": UPGRADE,
    "set-cookie": SET_COOKIE,
    "set-cookie2": DROP,
    "service-worker-allowed": SERVICE_WORKER_ALLOWED,
    "date": DATE,
    # About the whole host, which is the dispatcher's and not the agent's:
    "strict-transport-security": DROP,
    "public-key-pins": DROP,
    "alt-svc": DROP,
    "clear-site-data": CLEAR_SITE_DATA,
    "nel": DROP,  # reports each request to the host, the portal's too, long after the session
    "report-to": DROP,
    "content-type": CONTENT_TYPE,
    # Orders to a front proxy, which would read its own files for the agent:
    "x-accel-redirect": DROP,
    "x-sendfile": DROP,
    "x-lighttpd-send-file": DROP,
}

#: Never taken from a trailer section (RFC 9110, 6.5.1): framing, routing, authentication, and cookies.
_TRAILER_FORBIDDEN = frozenset(
    {
        *_REQUEST,
        *_RESPONSE,
        "authorization",
        "content-encoding",
        "content-range",
        "content-type",
        "cache-control",
        "location",
        "max-forwards",
        "range",
        "retry-after",
        "trailer",
        "vary",
        "via",
        "www-authenticate",
    }
)


class BadHead(Exception):
    """A head, a chunk or a trailer section that must not be passed on.

    :ivar status: what to answer a client with; :ivar why: one sentence.
    """

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.why = why
        self.status = status


#: A line that is passed on as it is, and one that is not: most lines are one of these.
KEPT: Entry = (KEEP, b"")
DROPPED: Entry = (DROP, b"")

#: Fields whose lines come again and again and hold nothing that is anybody's secret.
_REPEATED = frozenset(
    {
        *("accept", "accept-charset", "accept-encoding", "accept-language", "cache-control", "connection"),
        *("content-encoding", "content-length", "content-type", "dnt", "host", "keep-alive", "origin", "pragma"),
        *(
            "priority",
            "te",
            "transfer-encoding",
            "upgrade",
            "upgrade-insecure-requests",
            "user-agent",
            "x-requested-with",
        ),
        *(
            "sec-ch-ua",
            "sec-ch-ua-mobile",
            "sec-ch-ua-platform",
            "sec-fetch-dest",
            "sec-fetch-mode",
            "sec-fetch-site",
        ),
        *("sec-fetch-user", "sec-gpc", "sec-websocket-extensions", "sec-websocket-version"),
        *("accept-ranges", "access-control-allow-credentials", "access-control-allow-headers"),
        *("access-control-allow-methods", "access-control-allow-origin", "access-control-expose-headers"),
        *("content-disposition", "content-security-policy", "cross-origin-embedder-policy", "permissions-policy"),
        *("cross-origin-opener-policy", "cross-origin-resource-policy", "expires", "referrer-policy", "server"),
        *("strict-transport-security", "trailer", "vary", "x-content-type-options", "x-frame-options"),
        *("x-powered-by", "x-xss-protection"),
    }
)
_MAX_LINES = 4096
_MAX_LINE = 400


class Lines:
    """What field lines mean, by exact bytes.

    `known` is read directly by the parsers: a line that was seen before was checked then, and is one dictionary
    lookup.  On a miss they call `learn`.
    """

    __slots__ = ("_kinds", "_names", "_prefixes", "_repeated", "known")

    def __init__(self, kinds: dict[str, int], prefixes: tuple[str, ...] = ()) -> None:
        self._kinds = kinds
        self._prefixes = prefixes
        self._names: dict[bytes, int] = {}
        self._repeated: set[bytes] = set()
        self.known: dict[bytes, Entry] = {}

    def learn(self, line: bytes) -> Entry:
        """Return the kind and, where it is looked at, the value of a line that is not in `known`.

        :raises BadHead: no field line (RFC 9112, 5); a folded line shows here, as it begins with a space.
        """
        name, colon, value = line.partition(b":")
        kind = self._names.get(name)
        if kind is None:
            kind = self._name(name)
        if not colon:
            raise BadHead("a header line without a colon")
        if 0 in value.translate(CHECK):
            raise BadHead("a control character in a header")
        if kind == REFUSE:
            raise BadHead("a framing header spelled with an underscore")
        entry = KEPT if kind == KEEP else DROPPED if kind == DROP else (kind, value.strip(b" \t"))
        if name in self._repeated and len(line) <= _MAX_LINE:
            if len(self.known) >= _MAX_LINES:
                self.known.clear()
            self.known[line] = entry
        return entry

    def _name(self, name: bytes) -> int:
        if not _TOKEN.fullmatch(name):
            if name[:1] in {b" ", b"\t"}:
                raise BadHead("a folded header line")
            raise BadHead("a header name that is no token")
        text = name.decode("ascii").lower()
        kind = self._kinds.get(text)
        if kind is None:
            kind = self._odd(text)
        if len(self._names) < _MAX_CACHED and len(name) <= _MAX_CACHED_NAME:
            self._names[name] = kind
            if text in _REPEATED:
                self._repeated.add(name)
        return kind

    def _odd(self, text: str) -> int:
        plain = text.replace("_", "-")
        if plain.startswith(self._prefixes):
            return DROP
        if "_" not in text:
            return KEEP
        if plain in _FRAMING:
            return REFUSE
        # An application that reads X_Forwarded_For as X-Forwarded-For would believe the client.
        kind = self._kinds.get(plain, KEEP)
        return DROP if kind != KEEP and kind < LOOKED_AT else KEEP


REQUEST_LINES = Lines(_REQUEST, _IDENTITY_PREFIXES)
RESPONSE_LINES = Lines(_RESPONSE)

_options: dict[bytes, frozenset[bytes]] = {}


def connection_options(value: bytes) -> frozenset[bytes]:
    """Return the options of a `Connection` field, lower case (RFC 9110, 7.6.1)."""
    options = _options.get(value)
    if options is None:
        options = frozenset(option.strip(b" \t").lower() for option in value.split(b","))
        if len(_options) < _MAX_CACHED and len(value) <= _MAX_CACHED_NAME:
            _options[value] = options
    return options


def without_named(lines: list[bytes], options: frozenset[bytes]) -> list[bytes]:
    """Return `lines` without those that a `Connection` option names."""
    return [line for line in lines if line.partition(b":")[0].lower() not in options]


def trailer_lines(lines: list[bytes]) -> list[bytes]:
    """Return the lines of a trailer section that may be passed on.

    :raises BadHead: a line that is no field line.
    """
    kept = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or 0 in value.translate(CHECK):
            raise BadHead("a bad trailer line")
        text = name.decode("ascii").lower().replace("_", "-")
        if text not in _TRAILER_FORBIDDEN and not text.startswith(_IDENTITY_PREFIXES):
            kept.append(line)
    return kept
