"""``python -m dispatcher.demo --unix PATH | --port N``: runs the demo app until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from flask import Flask
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from dispatcher.demo.app import create_app

MAX_THREADS = 64  # requests and WebSockets at the same time; more connections wait
STOP_TIMEOUT = 0.5  # seconds for requests in flight at the end


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dispatcher.demo", description="A small notebook for one user."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--unix", type=Path, metavar="PATH", help="listen on a Unix socket (mode 0660)")
    where.add_argument("--port", type=int, help="listen on this port of the loopback interface")
    data = Path(os.environ.get("DISPATCHER_DATA") or ".")
    parser.add_argument("--data", type=Path, default=data, metavar="DIR", help="directory for all data")
    parser.add_argument("--portal", default="/auth", metavar="PATH", help="path of the portal's pages")
    return parser.parse_args(argv)


class Handler(WSGIRequestHandler):
    """One connection."""

    timeout = 60  # seconds for the next bytes of a request

    def handle_expect_100(self) -> bool:
        """Leave ``100 Continue`` to Werkzeug, which sends it as well."""
        return True

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log no requests: the proxy does."""


class HttpServer(ThreadedWSGIServer):
    """A threaded server on a socket that exists, with a bound on its threads."""

    def __init__(self, listener: socket.socket, app: Flask) -> None:
        host = "unix://demo" if listener.family == socket.AF_UNIX else "127.0.0.1"
        super().__init__(host, 0, app, Handler, fd=listener.fileno())
        self._free = threading.BoundedSemaphore(MAX_THREADS)
        self._lock = threading.Lock()
        self.busy = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, once there is one to spare."""
        self._free.acquire()
        with self._lock:
            self.busy += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self.busy -= 1
            self._free.release()


def listen(options: argparse.Namespace) -> socket.socket:
    """Return the listening socket.

    :raises OSError: the address cannot be used.
    """
    if not options.unix:
        return socket.create_server(("127.0.0.1", options.port), backlog=128)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o117)  # the group is the proxy's: it must be able to connect
    try:
        listener.bind(str(options.unix))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT.

    :raises OSError: the data directory or the address cannot be used.
    """
    directory = options.data.absolute()
    app = create_app(directory, options.portal)
    with listen(options) as listener:
        where = options.unix or f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = HttpServer(listener, app)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends `serve_forever`, as Ctrl-C does
    print(f"The demo app listens on {where} and keeps its data in {directory}", flush=True)  # noqa: T201 - its log
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    app.extensions["clocks"].close()
    if options.unix:
        options.unix.unlink(missing_ok=True)
    end = time.monotonic() + STOP_TIMEOUT
    while server.busy and time.monotonic() < end:
        time.sleep(0.01)


def main() -> None:
    """Run the program."""
    options = arguments()
    try:
        serve(options)
    except OSError as error:
        sys.exit(f"The demo app cannot start: {error}")


if __name__ == "__main__":
    main()
