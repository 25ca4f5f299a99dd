"""The portal: the proxy's own pages.  One more upstream to the edge; holds no key and no credential."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dispatcher.config.load import Config


def serve(config: Config, sock: socket.socket) -> None:
    """Serve the portal on a bound Unix socket until the process ends."""
    from dispatcher.proxy.portal.server import serve as run

    run(config, sock)
