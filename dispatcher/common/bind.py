"""Binds listeners, also to addresses that this host gets later."""

from __future__ import annotations

import errno
import socket

from dispatcher.common.log import logger

#: IP_FREEBIND of ip(7), IPV6_FREEBIND of ipv6(7): Python does not name them.
_FREE = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}


def bind(sock: socket.socket, where: tuple[object, ...], address: str) -> None:
    """Bind a listener, also to an address that this host gets later (DHCP, failover, VPN).

    :param address: for the log.
    :raises OSError: it cannot be bound.
    """
    try:
        sock.bind(where)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL or sock.family not in _FREE:
            raise
        sock.setsockopt(*_FREE[sock.family], 1)
        sock.bind(where)
        logger("listeners").warning(
            "this host does not have the address yet; it is served once the host has it", address=address
        )
