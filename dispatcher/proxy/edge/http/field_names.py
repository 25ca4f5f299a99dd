"""The names of HTTP fields, and what each means for the edge.

Each name has a *kind*, a small number that decides the treatment of its line.
"""

from __future__ import annotations

import re
from typing import Final

#: CGI and WSGI turn ``-`` into ``_``, some servers every byte that is neither letter nor digit.
ODD: Final = re.compile(r"[^0-9a-z-]")
TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MAX_LEARNED: Final = 1024
_MAX_LEARNED_NAME: Final = 64

# The treatment of a line.  The values of kinds from SPECIAL on are collected.
KEEP: Final = 0  # passed on byte for byte
DROP: Final = 1
REFUSE: Final = 2  # no honest sender writes it
SPECIAL: Final = 3

# Requests.
HOST: Final = 3
COOKIE: Final = 4
CONNECTION: Final = 5
CONTENT_LENGTH: Final = 6
TRANSFER_ENCODING: Final = 7
EXPECT: Final = 8
UPGRADE: Final = 9
TE: Final = 10
X_FORWARDED_FOR: Final = 11
X_FORWARDED_HOST: Final = 12
X_FORWARDED_PROTO: Final = 13
X_REQUEST_ID: Final = 14
X_FORWARDED_PORT: Final = 15
# Answers.
CACHE_CONTROL: Final = 16
EXPIRES: Final = 17
# The lines of kinds from LOOKED_AT on are passed on as well.
LOOKED_AT: Final = 20
ACCEPT: Final = 20
SEC_FETCH_MODE: Final = 21
SEC_FETCH_SITE: Final = 22
ORIGIN: Final = 23
SERVICE_WORKER: Final = 24
SEC_PURPOSE: Final = 25
UPGRADE_INSECURE: Final = 26
# Answers.
DATE: Final = 27
CONTENT_TYPE: Final = 28
ANSWER_LENGTH: Final = 29
SET_COOKIE: Final = 30
SERVICE_WORKER_ALLOWED: Final = 31
CLEAR_SITE_DATA: Final = 32
# Requests.
AUTHORIZATION: Final = 33

#: Fields that are about one connection only (RFC 9110, 7.6.1), besides those that `Connection` names.
_HOP_BY_HOP: Final = dict.fromkeys(
    ("keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "proxy-authentication-info"),
    DROP,
)

#: Identity and origin of a client: only the edge or a trusted proxy states them.
_IDENTITY: Final = dict.fromkeys(
    (
        *("forwarded", "x-forwarded", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip"),
        *("cf-connecting-ip", "cf-connecting-ipv6", "fastly-client-ip", "client-ip", "proxy-client-ip"),
        *("wl-proxy-client-ip", "x-azure-clientip", "x-host", "x-http-host-override", "x-rewrite-url"),
        *("x-url-scheme", "x-scheme", "x-https", "https", "front-end-https", "x-script-name", "x-ingress-path"),
        *("remote-addr", "remote-user", "remote-name", "remote-email", "remote-groups", "x-original-url"),
        *("x-original-uri", "x-original-host", "x-original-proto", "x-original-forwarded-for"),
        *("x-auth-user", "x-auth-username", "x-auth-name", "x-auth-email", "x-auth-groups", "x-auth-roles"),
        *("x-jwt-assertion", "cf-access-authenticated-user-email", "cf-access-jwt-assertion"),
        *("tailscale-user-login", "tailscale-user-name", "tailscale-user-profile-pic"),
        *("ssl-client-cert", "ssl-client-verify", "ssl-client-s-dn", "client-cert", "client-cert-chain"),
        *("x-sendfile-type", "x-accel-mapping"),  # how some apps name files to a front proxy
        "http2-settings",
        "proxy",  # becomes HTTP_PROXY in CGI (CVE-2016-5385)
    ),
    DROP,
)
#: X-Auth-Token and X-Auth-Key are credentials of apps' own clients, so not all of X-Auth- is dropped.
IDENTITY_PREFIXES: Final = (
    *("x-forwarded-", "x-dispatcher-", "x-remote-", "x-authenticated-", "x-auth-request-"),
    *("x-webauth-", "x-authentik-", "x-pomerium-", "x-vouch-", "x-consumer-", "x-goog-authenticated-"),
    *("x-goog-iap-", "x-amzn-oidc-", "x-ms-client-principal", "x-appengine-", "x-envoy-", "x-ssl-"),
    *("x-client-cert", "x-client-verify"),
)

_FRAMING: Final = {
    "content-length": CONTENT_LENGTH,
    "transfer-encoding": TRANSFER_ENCODING,
    "connection": CONNECTION,
}

_REQUEST: Final = {
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
    "x-forwarded-port": X_FORWARDED_PORT,
    "x-request-id": X_REQUEST_ID,
    "accept": ACCEPT,
    "sec-fetch-mode": SEC_FETCH_MODE,
    "sec-fetch-site": SEC_FETCH_SITE,
    "upgrade-insecure-requests": UPGRADE_INSECURE,
    "sec-purpose": SEC_PURPOSE,
    "origin": ORIGIN,
    "service-worker": SERVICE_WORKER,
    "authorization": AUTHORIZATION,
}

_RESPONSE: Final = {
    **_HOP_BY_HOP,
    **_FRAMING,
    "content-length": ANSWER_LENGTH,
    "upgrade": UPGRADE,
    "set-cookie": SET_COOKIE,
    "set-cookie2": DROP,
    "service-worker-allowed": SERVICE_WORKER_ALLOWED,
    "date": DATE,
    # These concern the whole host, which belongs to the dispatcher and not to the agent:
    "strict-transport-security": DROP,
    "public-key-pins": DROP,
    "expect-ct": DROP,
    "alt-svc": DROP,
    "clear-site-data": CLEAR_SITE_DATA,
    "nel": DROP,  # reports every request to the host, the portal's included, long after the session
    "report-to": DROP,
    "content-type": CONTENT_TYPE,
    # Statements to front proxies, besides those with `_COMMANDS`.  Pages with ESI include what a proxy can read.
    "surrogate-control": DROP,
    "edge-control": DROP,
    "x-accel-buffering": KEEP,  # streams of events need it
    "x-accel-expires": KEEP,
}

#: Commands to a front proxy: to send its own files, to ask other servers, or to treat the edge as unhealthy.
_COMMANDS: Final = ("x-accel-", "x-sendfile", "x-lighttpd-", "x-litespeed-", "x-reproxy-", "x-envoy-")

#: Cache-Control for one kind of caches (RFC 9213): they ignore the plain one.
_TARGETED: Final = "-cache-control"

#: Never taken from a trailer section (RFC 9110, 6.5.1): framing, routing, authentication, and cookies.
TRAILER_FORBIDDEN: Final = frozenset(
    {
        *_REQUEST,
        *_RESPONSE,
        *("authorization", "cache-control", "content-encoding", "content-range", "content-type", "location"),
        *("max-forwards", "range", "retry-after", "trailer", "vary", "via", "www-authenticate"),
    }
)
TRAILER_PREFIXES: Final = (*IDENTITY_PREFIXES, *_COMMANDS)


class BadHead(Exception):
    """An invalid head, chunk or trailer section: it must not be passed on.

    :ivar status: of the answer to a client; :ivar why: a noun phrase for "found ...".
    """

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.why = why
        self.status = status


class HeadTooLong(BadHead):
    """A head above `proxy.head_bytes`; `part` is what was read of it."""

    def __init__(self, limit: int, part: bytes) -> None:
        super().__init__(f"a head of more than {limit} bytes", 431)
        self.part = part[:limit]


class Names:
    """Kinds of field names by exact bytes.

    :ivar known: read directly by the parsers.  On a miss they call `learn`, which checks the name.
    :ivar perhaps: whether a name of some length and first letter may have another kind than `KEEP`; see `scan`.
    """

    def __init__(self, kinds: dict[str, int], prefixes: tuple[str, ...], suffixes: tuple[str, ...] = ()) -> None:
        self._kinds = kinds
        self._prefixes = prefixes  # of names that are dropped, as are those with a suffix
        self._suffixes = suffixes
        # The two usual spellings stay; other names are forgotten when there are too many of them.
        self._common = {
            spelling.encode("ascii"): kind for name, kind in kinds.items() for spelling in (name, name.title())
        }
        self.known: dict[bytes, int] = dict(self._common)
        perhaps = bytearray(64 * 32)
        for name in kinds:
            perhaps[perhaps_index(len(name), ord(name[0]))] = 1
        for prefix in prefixes:
            for length in range(len(prefix), 64):
                perhaps[perhaps_index(length, ord(prefix[0]))] = 1
        for suffix in suffixes:
            for index in range(perhaps_index(len(suffix), 0), len(perhaps)):
                perhaps[index] = 1
        self.perhaps: bytes = bytes(perhaps)

    def learn(self, name: bytes) -> int:
        """Return the kind of a name that is not in `known`.

        :raises BadHead: an invalid name, or one that hides a framing field.
        """
        if not TOKEN.fullmatch(name):
            if name[:1] in {b" ", b"\t"}:
                raise BadHead("a folded header line")
            raise BadHead(f"an invalid header name ({name[:40].decode('latin-1')!r})")
        text = name.decode("ascii").lower()
        kind = self._kinds.get(text)
        if kind is None:
            kind = self._other(text)
        if kind == REFUSE:
            raise BadHead("another spelling of a framing header")
        if len(name) <= _MAX_LEARNED_NAME:
            if len(self.known) >= len(self._common) + _MAX_LEARNED:
                self.known.clear()
                self.known.update(self._common)
            self.known[name] = kind
        return kind

    def _other(self, text: str) -> int:
        plain = ODD.sub("-", text)
        if plain.startswith(self._prefixes) or plain.endswith(self._suffixes):
            return DROP
        if plain == text:
            return KEEP
        if plain in _FRAMING:
            return REFUSE
        # An application that reads X_Forwarded_For or X.Forwarded.For as X-Forwarded-For would trust the client.
        kind = self._kinds.get(plain, KEEP)
        return DROP if kind != KEEP and kind < LOOKED_AT else KEEP


def perhaps_index(length: int, first: int) -> int:
    """Return where `Names.perhaps` tells about names of a length and a first letter in either case."""
    return min(length, 63) << 5 | (first & 31)


REQUEST_NAMES: Final = Names(_REQUEST, IDENTITY_PREFIXES)
RESPONSE_NAMES: Final = Names(_RESPONSE, _COMMANDS)
#: Of answers of agents: their statement to caches is joined with the edge's own.
_AGENT: Final = {
    **_RESPONSE,
    "cache-control": CACHE_CONTROL,
    "expires": EXPIRES,
    "x-accel-expires": DROP,
    "cf-edge-cache": DROP,
}
AGENT_NAMES: Final = Names(_AGENT, _COMMANDS, (_TARGETED,))
#: Of answers of agents that share an origin.
SHARED_NAMES: Final = Names(
    {
        **_AGENT,
        # Browsers keep these for the whole origin, and for paths of it that the agent names:
        **dict.fromkeys(("accept-ch", "critical-ch", "use-as-dictionary"), DROP),
    },
    _COMMANDS,
    (_TARGETED,),
)
