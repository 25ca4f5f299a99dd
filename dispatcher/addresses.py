"""Whom an address stands for when connections are counted.  Pure."""

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
