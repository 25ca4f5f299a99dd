"""Notifications to systemd, sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket

VARIABLE = "NOTIFY_SOCKET"


def notify(state: str, address: str | None = None) -> None:
    """Send a state such as ``READY=1``; do nothing when systemd does not ask for notifications.

    :param address: the value of $NOTIFY_SOCKET, where the caller has removed it from the environment.
    """
    address = os.environ.get(VARIABLE, "") if address is None else address
    if not address.startswith(("/", "@")):
        return
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        contextlib.suppress(OSError),
    ):
        sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
