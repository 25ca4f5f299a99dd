"""PROXY protocol version 2: the client's address, as a load balancer sends it.

With ``proxy.proxy_protocol`` every connection must begin with such a header (haproxy's proxy-protocol.txt,
section 2.2); one that does not is closed.  The header comes before TLS: `handshakes` reads it.
"""

from __future__ import annotations

import ipaddress
import struct

from dispatcher.proxy.edge.http.field_names import BadHead

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_HEAD = struct.Struct("!12sBBH")
HEAD_SIZE = _HEAD.size
_LONGEST = 4096


def parse_head(head: bytes) -> tuple[int, int, int]:
    """Return command, family and the number of bytes that follow the first sixteen.

    :raises BadHead: the bytes are not PROXY protocol version 2.
    """
    signature, version, family, length = _HEAD.unpack(head)
    if signature != SIGNATURE or version >> 4 != 2 or version & 0x0F > 1 or length > _LONGEST:
        raise BadHead("bytes that are not PROXY protocol version 2")
    return version & 0x0F, family, length


def parse_address(command: int, family: int, rest: bytes) -> str | None:
    """Return the client's address; None for a health check of the balancer itself, or an unknown family.

    :raises BadHead: the address is cut off.
    """
    if command == 0:
        return None
    kind = family >> 4
    if kind == 1 and len(rest) >= 12:
        return str(ipaddress.IPv4Address(rest[:4]))
    if kind == 2 and len(rest) >= 36:
        address = ipaddress.IPv6Address(rest[:16])
        return str(address.ipv4_mapped or address)
    if kind in {1, 2}:
        raise BadHead("a PROXY header that is cut off")
    return None
