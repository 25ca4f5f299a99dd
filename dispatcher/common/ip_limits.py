"""Whom an address stands for when connections are counted, and the counting.  Pure."""

from __future__ import annotations

import functools
import ipaddress


@functools.lru_cache(maxsize=4096)
def network(address: str) -> str:
    """Return what one customer of a provider usually has: an IPv4 address, or the /64 of an IPv6 address.

    Whoever has one address of a /64 has 2^64 of them (RFC 6177), each as good as the other.  What is no address is
    returned as it is.
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
    """How many of something each network has.  Not for several threads at a time."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        """How many networks have any."""
        return len(self._counts)

    def of(self, address: str) -> int:
        """Return how many there are."""
        return self._counts.get(network(address), 0)

    def add(self, address: str) -> int:
        """Count one more; return how many there are now."""
        key = network(address)
        self._counts[key] = count = self._counts.get(key, 0) + 1
        return count

    def drop(self, address: str) -> None:
        """Count one less."""
        key = network(address)
        left = self._counts[key] - 1
        if left:
            self._counts[key] = left
        else:
            del self._counts[key]
