"""Counts per client network, for limits on connections.  Pure."""

from __future__ import annotations

import functools
import ipaddress


@functools.lru_cache(maxsize=4096)
def network(address: str) -> str:
    """Return the network that one client usually has: an IPv4 address, or the /64 of an IPv6 address.

    A client with one address of a /64 can use all 2^64 of them (RFC 6177).  Other text is returned unchanged.
    """
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((found, 64), strict=False))


class Tally:
    """A count for each network.  Not thread-safe."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        """The number of networks with a count above zero."""
        return len(self._counts)

    def of(self, address: str) -> int:
        """Return the count of the address's network."""
        return self._counts.get(network(address), 0)

    def add(self, address: str) -> int:
        """Add one to the count and return it."""
        key = network(address)
        self._counts[key] = count = self._counts.get(key, 0) + 1
        return count

    def drop(self, address: str) -> None:
        """Subtract one from the count."""
        key = network(address)
        left = self._counts[key] - 1
        if left:
            self._counts[key] = left
        else:
            del self._counts[key]
