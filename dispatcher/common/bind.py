"""Binds listeners, also to addresses that this host gets later; what to do about a port that is refused."""

from __future__ import annotations

import errno
import os
import socket

from dispatcher.common import systemd
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


def low_port_fix(port: int, unit: str = "dispatcher-proxy") -> str:
    """Return what to do where a port may not be opened (EACCES), which only root and some services may below 1024.

    :param unit: the systemd unit of this program.
    """
    if systemd.VARIABLE in os.environ:
        return (
            f"ports below 1024 need AmbientCapabilities=CAP_NET_BIND_SERVICE (systemctl edit {unit}) and a restart"
        )
    return (
        "ports below 1024 are root's: choose a higher one, with a front proxy before it "
        "(docs/howto/front-proxy.md), or as root allow this one to all users, "
        f"sysctl net.ipv4.ip_unprivileged_port_start={port}; "
        "what root has started needs a restart"
    )
