"""The Autobahn test cases for WebSockets (RFC 6455 and 7692), through the edge.

The edge passes frames on as they come, so whatever the application at its other side is found to do right or wrong, it
must be found to do through the edge too: each verdict is compared with the one without the edge.  All cases but some of
those that only move megabytes are run; `kosoku` is a runner of the original cases.
"""

from __future__ import annotations

import asyncio
import gc
import contextlib
import logging
import sys
from collections.abc import AsyncIterator

import pytest
from kosoku import FailureError, run_fuzzingclient
from websockets.asyncio.server import serve

from tests.support.edge_feed import agent_row
from tests.support.edge_harness import COOKIE, Edge, eventually

# Of the limits messages of 64 KiB, of the compression each way to negotiate it with the smallest messages.
CASES = [
    *(f"{group}.*" for group in (1, 2, 3, 4, 5, 6, 7, 10)),
    *("9.1.1", "9.2.1", "12.1.1", "12.2.1"),
    *(f"13.{way}.1" for way in range(1, 8)),
]
_AT_LEAST = 247 + 11  # so many there are


@pytest.fixture(autouse=True)
def _no_shim():
    """`kosoku` leaves a `pkg_resources` of its own, with which `MonkeyPatch.syspath_prepend` fails in later tests."""
    yield
    sys.modules.pop("pkg_resources", None)


@contextlib.asynccontextmanager
async def signed_in(port: int) -> AsyncIterator[int]:
    """Offer the edge without a sign-in, as the cases know none: put the session's cookie into each first head."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            from_edge, to_edge = await asyncio.open_connection("127.0.0.1", port)
            to_edge.write(head[:-2] + COOKIE + b"\r\n")
            await asyncio.gather(pump(reader, to_edge), pump(from_edge, writer))
            to_edge.close()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def failures(port: int) -> dict[str, str]:
    """Return the cases that the server at a port fails, and why."""
    try:
        results = await run_fuzzingclient(f"127.0.0.1:{port}", CASES, None, concurrency=4)
    except FailureError as error:
        results = error.results
    passed = {"OK", "NON-STRICT", "INFORMATIONAL"}
    assert len(results) >= _AT_LEAST, f"only {len(results)} cases were run"
    return {
        result.case_id: f"{result.behavior.value}, {result.behavior_close.value}"
        for result in results
        if not {result.behavior.value, result.behavior_close.value} <= passed
    }


async def compare(edge: Edge) -> tuple[dict[str, str], dict[str, str]]:
    async def echo(peer) -> None:
        async for message in peer:
            await peer.send(message)

    quiet = logging.getLogger("websockets.quiet")  # most cases are errors that it would tell at length
    quiet.setLevel(logging.CRITICAL)
    async with serve(echo, "127.0.0.1", 0, max_size=2**26, ping_interval=None, logger=quiet) as server:
        port = server.sockets[0].getsockname()[1]
        edge.feed.add(agents=(agent_row("alice", f"tcp:127.0.0.1:{port}"),))
        await asyncio.to_thread(
            eventually, lambda: str(port) in edge.worker.context.tables.agents["alice"].endpoint
        )
        directly = await failures(port)
        async with signed_in(edge.port) as through:
            return directly, await failures(through)


# The cases leave their test data and some connections open.
@pytest.mark.filterwarnings("ignore:unclosed (file .*kosoku|transport|<socket):ResourceWarning")
def test_every_case_has_the_verdict_that_it_has_without_the_edge():
    with Edge() as edge:
        directly, through = asyncio.run(compare(edge))
    gc.collect()  # what they leave is no fault of a later test
    assert through == directly
    # The library calls a close in the middle of a fragmented message an error of the protocol.
    assert set(directly) <= {"7.1.5"}
