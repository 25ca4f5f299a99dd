"""Connects to an agent's endpoint without trusting the agent.

An agent can write to the directory of its Unix endpoint.  The endpoint is opened with ``O_PATH | O_NOFOLLOW``,
verified to be a socket of the agent's user, and connected through ``/proc/self/fd/N``.  The verified file is
the one that is connected, so replacing the socket by a link to another one has no effect.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from dispatcher.plugin.errors import InsecureEndpoint
from dispatcher.plugin.model import Endpoint


@contextmanager
def checked_unix_path(path: str, owner_uid: int | None) -> Iterator[str]:
    """Yield a path under ``/proc/self/fd`` that names the checked socket, valid inside the block.

    :raises FileNotFoundError: there is nothing at `path`.
    :raises InsecureEndpoint: a symbolic link, not a socket, or not owned by `owner_uid` (None: any owner).
    """
    parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fd = os.open(os.path.basename(path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode):
            raise InsecureEndpoint(
                "The agent's endpoint is not a socket",
                why=f"{path} is of type {stat.filemode(status.st_mode)[0]!r}",
                fix="start the agent again; its app must listen on a plain socket at that path",
            )
        if owner_uid is not None and status.st_uid != owner_uid:
            raise InsecureEndpoint(
                "The agent's endpoint belongs to another user",
                why=f"{path} has owner {status.st_uid}, not {owner_uid}",
            )
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def connect(endpoint: Endpoint, owner_uid: int | None, timeout: float) -> socket.socket:
    """Return a connected socket with `timeout` seconds set.

    :raises OSError: no process listens there (FileNotFoundError, ConnectionRefusedError, TimeoutError, ...).
    :raises InsecureEndpoint: as `checked_unix_path`.
    """
    if endpoint.kind == "tcp":
        return socket.create_connection((endpoint.host, endpoint.port), timeout)
    sock = socket.socket(socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_VSOCK)
    try:
        sock.settimeout(timeout)
        if endpoint.kind == "unix":
            with checked_unix_path(endpoint.path, owner_uid) as path:
                sock.connect(path)
        else:
            sock.connect((endpoint.cid, endpoint.port))
    except BaseException:
        sock.close()
        raise
    return sock
