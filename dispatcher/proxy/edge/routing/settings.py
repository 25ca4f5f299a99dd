"""The edge's settings, derived from the configuration once, and its fixed limits."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from dispatcher.config.load import Config
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.names import printable
from dispatcher.proxy import cookies
from dispatcher.proxy.edge.http.response import Policy
from dispatcher.proxy.edge.http.trusted_proxies import Network
from dispatcher.proxy.origins import origin

FOREVER: Final = float("inf")

#: Fixed limits; each is tested like those of the configuration.
CONNECT_TIMEOUT: Final = 10.0  # seconds for a connection to an agent
LOOKUP_TIMEOUT: Final = 2.0  # seconds that a request waits for the lookup of its session
LINGER: Final = 2.0  # seconds of reading after the last answer (RFC 9112, 9.6)
LINGER_BYTES: Final = 1 << 20  # that are read and dropped meanwhile
CLOSE_TIMEOUT: Final = 1.0  # seconds that a WebSocket's client has to take its Close frame
HALF_CLOSED: Final = 10.0  # seconds that a client is answered which has closed its side: it may be gone
LEAST_READ: Final = 1024  # bytes that a slow reader must take within `body_timeout`
MAX_HELD: Final = 64  # requests held for one agent
MAX_IDLE: Final = 64  # pooled connections to one agent
IDLE_UPSTREAM: Final = 55.0  # seconds that a pooled connection is kept
FRESH_UPSTREAM: Final = (
    2.0  # seconds after which a pooled connection is too old for a request that cannot be repeated
)
MAX_INFORMATIONAL: Final = 16  # 1xx answers before the final one
PORTAL_BODY: Final = 1 << 16  # bytes of a body for the portal, as it comes: chunked coding included
COLLECTED: Final = 16 << 20  # bytes of such bodies that are not complete, for all of a worker's connections
SMALL_BODY: Final = 4096  # bytes of one that are accepted even above that
WRITE_HIGH: Final = 256 * 1024  # bytes that may wait in memory for a slow reader
PIPELINED: Final = 16 * 1024  # bytes of further requests, above which a client is not read before its answer
UNSENT: Final = 512 * 1024  # the same in the kernel, besides what is on its way to the reader
DENSE: Final = 64  # bytes for each chunk or frame; a body or WebSocket with fewer is read slowly
CHUNK_PAUSE: Final = 5e-6  # seconds without reading for each chunk or frame: ten times what its parsing takes
EVENTS_PING: Final = 15.0  # seconds between comments on a silent event stream
MAX_EVENTS: Final = 16  # event streams of one session


class Settings:
    """Precomputed forms of ``[proxy]``; see `ProxyConfig` for their meaning."""

    @property
    def handshakes(self) -> int:
        """Limit of connections with a handshake in progress: a quarter of all."""
        return max(16, self.connections // 4)

    def __init__(self, config: Config) -> None:
        """Derive them.

        :raises ConfigError: `proxy.trusted_proxies` or `proxy.public_url` is not valid.
        """
        proxy = config.proxy
        self.body_timeout = proxy.body_timeout
        self.connections = proxy.connections
        self.connections_per_address = proxy.connections_per_address
        self.drain_timeout = proxy.drain_timeout
        self.feed_grace = proxy.feed_grace
        self.head_bytes = proxy.head_bytes
        self.head_fields = proxy.head_fields
        self.head_timeout = proxy.head_timeout
        self.hold = proxy.hold
        self.half_closed = min(HALF_CLOSED, proxy.body_timeout)
        self.idle_timeout = proxy.idle_timeout
        self.in_flight = proxy.in_flight_per_agent
        self.handshakes_per_address = max(8, proxy.connections_per_address // 4)
        self.portal_share = max(1, proxy.in_flight_per_agent // 2)
        self.metrics_by_agent = proxy.metrics_by_agent
        self.upstream_timeout = proxy.upstream_timeout
        self.prefix = proxy.prefix.encode()
        self.login = self.prefix + b"/login?next="
        self.waiting = self.prefix + b"/waiting"
        self.events_path = self.prefix + b"/events"
        self.secure = config.secure
        self.scheme = b"https" if config.secure else b"http"
        self.cookie_name = cookies.names(config.secure).session.encode()
        self.subdomain = proxy.routing == "subdomain"
        self.public_host, self.domain = _public(proxy.public_url, self.subdomain)
        self.public_origin = origin(proxy.public_url)
        guarded = b"" if self.subdomain else self.prefix + b"/"
        self.policy = Policy(guarded, host_only=self.subdomain)
        hsts = proxy.hsts if config.secure and proxy.hsts is not False else None
        self.hsts_line = b"" if hsts is None else b"Strict-Transport-Security: max-age=%d\r\n" % int(hsts)
        #: What a cache keeps of an agent is for its user alone, and where agents share an origin, for one session.
        self.vary = b"" if self.subdomain else b"Vary: Cookie\r\n"
        self.agent_lines = b"Cache-Control: private\r\n" + self.vary
        #: Over plain HTTP a sign-out cannot clear the browser's cache, and Back would show a page.
        self.page_cache = b"" if self.subdomain or config.secure else b"no-store"
        self.trusted_unix = "unix" in proxy.trusted_proxies
        self.trusted = tuple(_network(text) for text in proxy.trusted_proxies if text != "unix")


def _public(url: str, subdomain: bool) -> tuple[bytes, bytes]:
    """Return the public host with its port, and the parent domain of agents' hosts, both in lower case."""
    if not url:
        return b"", b""
    parts = urlsplit(url)
    try:
        usable = parts.scheme in {"http", "https"} and parts.hostname and not parts.path.strip("/")
        port = parts.port
    except ValueError:
        usable = None
        port = None
    if not usable or parts.query or parts.fragment or parts.username:
        raise ConfigError(
            f"proxy.public_url: found {printable(url)}, expected a URL of scheme and host alone",
            fix="write it like https://apps.example.org",
        )
    host = (parts.hostname or "").encode("idna" if subdomain else "utf-8").lower()
    return host + (b":%d" % port if port else b""), host


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"proxy.trusted_proxies: found {printable(text)}, expected a network such as 10.0.0.0/8, or unix",
            why=str(error),
        ) from error
