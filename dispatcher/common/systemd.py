"""The service manager's protocols: notifications (sd_notify(3)), and sockets that it passes and keeps.

A socket that a service stores there (FileDescriptorStoreMax=) stays open and is passed to the next start, so that
a restart refuses no connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable

VARIABLE = "NOTIFY_SOCKET"
_FIRST_FD = 3


def notify(state: str, address: str | None = None, *, fds: Iterable[int] = ()) -> None:
    """Send a state such as ``READY=1``; do nothing when systemd does not ask for notifications.

    :param address: the value of $NOTIFY_SOCKET, where the caller has removed it from the environment.
    :param fds: descriptors that belong to the state.
    """
    address = os.environ.get(VARIABLE, "") if address is None else address
    if not address.startswith(("/", "@")):
        return
    target = "\0" + address[1:] if address[0] == "@" else address
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        contextlib.suppress(OSError),
    ):
        sock.connect(target)
        socket.send_fds(sock, [state.encode()], list(fds))


def store(name: str, sock: socket.socket) -> None:
    """Let systemd keep a socket over restarts, under a name."""
    notify(f"FDSTORE=1\nFDNAME={name}", fds=[sock.fileno()])


def forget(name: str) -> None:
    """Let systemd close a socket that it keeps."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def passed() -> list[tuple[str, socket.socket]]:
    """Return the sockets that systemd passes to this process, with their names (sd_listen_fds_with_names(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "").isdecimal():
        return []
    fds = range(_FIRST_FD, _FIRST_FD + int(os.environ["LISTEN_FDS"]))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for fd in fds:
        os.set_inheritable(fd, False)
    return [(names[at] if at < len(names) else "", socket.socket(fileno=fd)) for at, fd in enumerate(fds)]
