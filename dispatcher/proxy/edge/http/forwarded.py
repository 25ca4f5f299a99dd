"""Who the client is, behind proxies that are believed.  Pure.

Nobody is believed by default.  From a trusted peer the edge takes `X-Forwarded-For` (the last address that is no
trusted proxy itself), `-Proto`, `-Host` and `X-Request-ID`; from everybody else it drops them.
"""

from __future__ import annotations

import ipaddress
import re

from dispatcher.proxy.edge.http import headers
from dispatcher.proxy.edge.routing.settings import Settings

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:@/+=-]{1,128}")
_HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_MAX_CACHED = 4096


class Forwarded:
    """Answers by address, remembered."""

    __slots__ = ("_peers", "_settings")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peers: dict[str, tuple[bytes, bool, bool]] = {}

    def peer(self, address: str) -> tuple[bytes, bool, bool]:
        """Return a peer's address for a header, whether it is believed, and whether it is exempt from a limit.

        A peer on a Unix socket has no address; it is on this machine.
        """
        known = self._peers.get(address)
        if known is None:
            known = self._peer(address)
            if len(self._peers) >= _MAX_CACHED:
                self._peers.clear()
            self._peers[address] = known
        return known

    def _peer(self, address: str) -> tuple[bytes, bool, bool]:
        if not address:
            return b"127.0.0.1", self._settings.trusted_unix, True
        parsed = _address(address.encode("ascii", "replace"))
        if parsed is None:
            return b"unknown", False, False
        trusted = self._trusted(parsed)
        return str(parsed).encode("ascii"), trusted, trusted or parsed.is_loopback

    def _trusted(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return any(address.version == network.version and address in network for network in self._settings.trusted)

    def believed(self, peer: str, fields: dict[int, bytes]) -> tuple[bytes, bytes, bytes]:
        """Return the client's address, the scheme and the host (or nothing) as trusted proxies say."""
        remote = self.peer(peer)[0]
        for text in reversed(fields.get(headers.X_FORWARDED_FOR, b"").split(b",")):
            address = _address(text)
            if address is None:
                break
            remote = str(address).encode("ascii")
            if not self._trusted(address):
                break
        proto = fields.get(headers.X_FORWARDED_PROTO, b"").rpartition(b",")[2].strip().lower()
        if proto not in {b"http", b"https"}:
            proto = self._settings.scheme
        host = fields.get(headers.X_FORWARDED_HOST, b"").rpartition(b",")[2].strip()
        return remote, proto, host if _HOST.fullmatch(host) else b""


def usable_request_id(fields: dict[int, bytes]) -> bytes:
    """Return a request id that may be passed on and logged, or nothing."""
    number = fields.get(headers.X_REQUEST_ID, b"")
    return number if _REQUEST_ID.fullmatch(number) else b""


def _address(text: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that one element of X-Forwarded-For means, a port left off."""
    plain = text.strip().decode("ascii", "replace")
    if plain.startswith("["):
        plain = plain[1:].partition("]")[0]
    elif plain.count(":") == 1:
        plain = plain.partition(":")[0]
    try:
        address = ipaddress.ip_address(plain)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
