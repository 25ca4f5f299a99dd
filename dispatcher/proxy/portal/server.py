"""Runs the portal on waitress, on an inherited socket."""

from __future__ import annotations

import logging
import socket

import waitress

from dispatcher.client.manager_client import ManagerClient
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config
from dispatcher.proxy import process
from dispatcher.proxy.portal import context
from dispatcher.proxy.portal.app import MAX_BODY, create_app

#: Threads for everything that is not a password check; those wait for the manager and cost 20 KiB each.
SPARE_THREADS = 8
TIMEOUT = 10.0  # seconds to wait for the manager
#: The same where it checks a password, which may be queued for half a minute before it is refused.
PASSWORD_TIMEOUT = 35.0


def serve(config: Config, sock: socket.socket) -> None:
    """Serve the portal until the process ends.

    :param sock: bound Unix socket, private to the proxy; the edge is its only client.
    """
    process.share_one_heap()
    # Waitress warns of each request that finds no idle thread, as the first ones do: no news for an operator.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    url = f"unix://{Paths.of(config).proxy_socket}"
    client, login_client = (ManagerClient(url, timeout=seconds) for seconds in (TIMEOUT, PASSWORD_TIMEOUT))
    waitress.serve(
        create_app(config, client, login_client),
        sockets=[sock],
        threads=context.LOGIN_SLOTS + SPARE_THREADS,
        asyncore_use_poll=True,  # descriptors past 1,024
        connection_limit=1000,
        clear_untrusted_proxy_headers=False,  # the edge has replaced them
        max_request_header_size=2 * config.proxy.head_bytes,
        max_request_body_size=4 * MAX_BODY,
        expose_tracebacks=False,
        ident=None,
    )
