"""docker-py's way to a Unix socket, without what it leaks: a socket that could not be connected is closed."""

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
    """What `requests` is given."""

    def get_connection(self, url: str | bytes, proxies: object = None) -> Pool:
        """Return the pool for a URL."""
        with self.pools.lock:
            pool: Pool | None = self.pools.get(url)
            if pool is None:
                pool = Pool(str(url), self.socket_path, self.timeout, maxsize=self.max_pool_size)
                self.pools[url] = pool
        return pool
