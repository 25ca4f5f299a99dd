"""``python -m dispatcher.demo --unix PATH | --port N``: runs the demo app until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from dispatcher.demo.app import Demo
from dispatcher.demo.server import Connection


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dispatcher.demo", description="A small notebook for one person."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--unix", type=Path, metavar="PATH", help="listen on a Unix socket (mode 0660)")
    where.add_argument("--port", type=int, help="listen on this port of the loopback interface")
    data = Path(os.environ.get("DISPATCHER_DATA") or ".")
    parser.add_argument("--data", type=Path, default=data, metavar="DIR", help="keep everything there")
    parser.add_argument("--portal", default="/auth", metavar="PATH", help="path of the portal's pages")
    return parser.parse_args(argv)


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT.

    :raises OSError: the data directory or the address cannot be used.
    """
    demo = Demo(options.data.absolute(), options.portal)
    connections: set[Connection] = set()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def connection() -> Connection:
        return Connection(demo.handle, connections)

    if options.unix:
        mask = os.umask(0o117)  # the group is the proxy's: it must be able to connect
        try:
            server = await loop.create_unix_server(connection, str(options.unix))
        finally:
            os.umask(mask)
    else:
        server = await loop.create_server(connection, "127.0.0.1", options.port)
    where = options.unix or f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    print(f"The demo app listens on {where} and keeps its data in {demo.directory}", flush=True)  # noqa: T201 - its log
    await stop.wait()
    server.close()
    for each in list(connections):
        each.shut_down()
    if options.unix:
        options.unix.unlink(missing_ok=True)
    for _ in range(50):  # half a second for the last bytes to leave
        if not connections:
            break
        await asyncio.sleep(0.01)


def main() -> None:
    """Run the program."""
    options = arguments()
    try:
        asyncio.run(serve(options))
    except OSError as error:
        sys.exit(f"The demo app cannot start: {error}")


if __name__ == "__main__":
    main()
