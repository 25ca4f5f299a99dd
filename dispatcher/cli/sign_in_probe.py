"""Whether the proxy serves the sign-in page."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dispatcher.plugin.endpoints import connect
from dispatcher.plugin.errors import InsecureEndpoint

if TYPE_CHECKING:
    from dispatcher.config.load import ProxyConfig
    from dispatcher.plugin.model import Endpoint

TIMEOUT = 1.0  # seconds
_PROXY_LOCAL = b"\x20\0\0\0"  # PROXY protocol, version 2: LOCAL, a connection without an address


def sign_in_page_answers(endpoint: Endpoint, proxy: ProxyConfig, url: str) -> bool:
    """Request the sign-in page from one of the proxy's listeners.

    An answer shows that a worker serves, a status below 500 that the portal does.

    :param url: the address that people open.
    """
    host = urlsplit(url).netloc or "localhost"
    request = f"GET {proxy.prefix}/login HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    try:
        sock = connect(endpoint, None, TIMEOUT)
    except (OSError, InsecureEndpoint):
        return False
    try:
        if proxy.proxy_protocol:
            from dispatcher.proxy.edge.http.proxy_protocol import SIGNATURE

            sock.sendall(SIGNATURE + _PROXY_LOCAL)
        if proxy.tls_cert is not None:
            from dispatcher.common.tls import client_context

            # Not verified: this process has started the listener.
            sock = client_context(verify=False).wrap_socket(sock)
        sock.sendall(request.encode())
        line = sock.recv(32)
    except OSError:
        return False
    finally:
        sock.close()
    return line.startswith(b"HTTP/1.1 ") and line[9:12] < b"500"
