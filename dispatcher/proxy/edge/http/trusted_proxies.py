"""The client's address behind trusted proxies.

No peer is trusted by default.  From a trusted one the edge takes `X-Forwarded-For` (the last address that is not a
trusted proxy itself), `-Proto`, `-Host`, `-Port` and `X-Request-ID`; from others it drops them.
"""

from __future__ import annotations

import ipaddress
import re

from dispatcher.proxy.edge.http import field_names

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:@/+=-]{1,128}")
_HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_MAX_CACHED = 4096


class TrustedProxies:
    """The trusted networks, and a cache of the addresses checked against them."""

    def __init__(self, networks: tuple[Network, ...], *, unix: bool, scheme: bytes) -> None:
        """Take the trusted networks.

        :param unix: trust peers on Unix sockets; :param scheme: where a proxy does not state one.
        """
        self._networks = networks
        self._unix_trusted = unix
        self._scheme = scheme
        self._peers: dict[str, tuple[bytes, bool, bool]] = {}

    def peer(self, address: str) -> tuple[bytes, bool, bool]:
        """Return a peer's address for a header, whether it is trusted, and whether it is exempt from limits.

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
            return b"127.0.0.1", self._unix_trusted, True
        parsed = _address(address.encode("ascii", "replace"))
        if parsed is None:
            return b"unknown", False, False
        trusted = self._trusted(parsed)
        return str(parsed).encode("ascii"), trusted, trusted or parsed.is_loopback

    def _trusted(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)

    def client_of(self, peer: str, fields: dict[int, bytes]) -> tuple[bytes, bytes, bytes]:
        """Return the client's address, the scheme and the host (or nothing) that trusted proxies state."""
        remote = self.peer(peer)[0]
        for text in reversed(fields.get(field_names.X_FORWARDED_FOR, b"").split(b",")):
            address = _address(text)
            if address is None:
                break
            remote = str(address).encode("ascii")
            if not self._trusted(address):
                break
        proto = fields.get(field_names.X_FORWARDED_PROTO, b"").rpartition(b",")[2].strip().lower()
        if proto not in {b"http", b"https"}:
            proto = self._scheme
        host = fields.get(field_names.X_FORWARDED_HOST) or fields.get(field_names.HOST, b"")
        host = host.rpartition(b",")[2].strip()
        port = fields.get(field_names.X_FORWARDED_PORT, b"").rpartition(b",")[2].strip()
        plain = b":" not in host.rpartition(b"]")[2]
        # The port of the other scheme is that of a connection between two proxies, not the browser's.
        if host and plain and port.isdigit() and port not in {b"80", b"443"}:
            host += b":" + port
        return remote, proto, host if _HOST.fullmatch(host) else b""


def usable_request_id(fields: dict[int, bytes]) -> bytes:
    """Return the request id of a trusted proxy, or nothing where it must not be logged."""
    number = fields.get(field_names.X_REQUEST_ID, b"")
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
