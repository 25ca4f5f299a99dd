"""Whether people would get the sign-in page.  Touches one connection to the proxy's listener."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dispatcher.plugin.endpoints import connect
from dispatcher.plugin.errors import InsecureEndpoint

if TYPE_CHECKING:
    from dispatcher.config.load import ProxyConfig
    from dispatcher.plugin.model import Endpoint

PATIENCE = 1.0  # seconds


def answers(endpoint: Endpoint, proxy: ProxyConfig, url: str) -> bool:
    """Ask for the sign-in page: an answer says that a worker serves, one below 500 that the portal does.

    :param url: what people open.
    """
    host = urlsplit(url).netloc or "localhost"
    request = f"GET {proxy.prefix}/login HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    try:
        sock = connect(endpoint, None, PATIENCE)
    except (OSError, InsecureEndpoint):
        return False
    try:
        if proxy.proxy_protocol:
            from dispatcher.proxy.edge.http.proxy_protocol import SIGNATURE

            sock.sendall(
                SIGNATURE + b"\x20\0\0\0"
            )  # a connection of the sender's own: version 2, LOCAL, no address
        if proxy.tls_cert is not None:
            from dispatcher.client.trust import context

            # Not verified: this process made the listener, it knows who it is.
            sock = context(verify=False, ca_file=None, cert_file=None, key_file=None).wrap_socket(sock)
        sock.sendall(request.encode())
        line = sock.recv(32)
    except OSError:
        return False
    finally:
        sock.close()
    return line.startswith(b"HTTP/1.1 ") and line[9:12] < b"500"
