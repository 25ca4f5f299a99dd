"""docker-py's way to a Unix socket, mended: connections are shared, and none is left open.

docker-py keeps a pool of connections for every URL, so that hardly any is used twice and dozens stay open; here
one pool serves all.  A socket that could not be connected is closed.
"""

from __future__ import annotations

import socket
from typing import Any

from docker.transport.unixconn import UnixHTTPAdapter, UnixHTTPConnection, UnixHTTPConnectionPool


class Connection(UnixHTTPConnection):
    """One connection."""

    def connect(self) -> None:
        """Connect, or leave nothing behind."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.unix_socket)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class Pool(UnixHTTPConnectionPool):
    """Kept connections."""

    def _new_conn(self) -> Any:
        return Connection(self.base_url, self.socket_path, self.timeout)  # type: ignore[arg-type]  # stubs say int


class Adapter(UnixHTTPAdapter):
    """What `requests` is given.

    :param path: of the socket; :param keep: connections that are kept for the next request.
    """

    def __init__(self, path: str, keep: int) -> None:
        super().__init__(f"http+unix://{path}")
        self._pool = Pool("http+docker://localhost", path, maxsize=keep)

    def get_connection(self, url: str | bytes, proxies: object = None) -> Pool:
        """Return the one pool."""
        return self._pool

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()
        super().close()
