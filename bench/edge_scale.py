#!/usr/bin/env python3
"""Measure the edge at scale: idle WebSockets on one worker, and large tables.

    bench/edge_scale.py [--websockets 9000] [--sessions 100000] [--agents 10000]

Idle WebSockets: memory per connection (private memory of the worker, divided), and the seconds from the end of their
session until the last one is closed.  Tables: seconds to load them from the feed's frames, memory, and the cost of a
request with full tables beside empty ones.  The proxy is the real daemon; manager and application are stand-ins.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def private_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(line.split()[1]) for line in text.splitlines() if line.startswith(("Private_Dirty", "Private_Clean"))
    )


def cpu(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


class Silent(asyncio.Protocol):
    """The application: accepts the upgrade, then sends nothing."""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(SWITCH)


class Idle(asyncio.Protocol):
    """The browser: upgrades, then waits."""

    def __init__(self, state, head):
        self.state, self.head, self.open = state, head, False

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.head)

    def data_received(self, data):
        if not self.open:
            assert data.startswith(b"HTTP/1.1 101"), data[:100]
            self.open = True
            self.state["open"] += 1

    def connection_lost(self, exc):
        self.state["lost"] += 1


def websockets(count: int) -> None:
    from tests.support.edge_daemon import Daemon
    from tests.support.edge_feed import agent_row
    from tests.support.edge_harness import COOKIE, TOKEN

    import uvloop

    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def call(coroutine, seconds=120):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(seconds)

    async def serve():
        return await loop.create_server(Silent, "127.0.0.1", 0, backlog=4096)

    port = call(serve()).sockets[0].getsockname()[1]
    state = {"open": 0, "lost": 0}
    head = b"GET /ws HTTP/1.1\r\nHost: a\r\n" + COOKIE + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with Daemon(connections=count + 500) as daemon:
        daemon.feed.add(agents=(agent_row("alice", f"tcp:127.0.0.1:{port}"),))
        time.sleep(0.5)
        (worker,) = daemon.workers()
        before = private_kib(worker)

        async def open_some(number):
            await asyncio.gather(
                *(
                    loop.create_connection(lambda: Idle(state, head), "127.0.0.1", daemon.port)
                    for _ in range(number)
                )
            )

        done = 0
        while done < count:
            number = min(250, count - done)
            call(open_some(number))
            done += number
            until(lambda: state["open"] >= done, 60)
        time.sleep(1.5)
        after = private_kib(worker)
        start, spent = time.monotonic(), cpu(worker)
        daemon.feed.remove(tokens=(TOKEN,))
        until(lambda: state["lost"] >= count, 60)
        taken, spent = time.monotonic() - start, cpu(worker) - spent
        print(
            f"{count} idle WebSockets: {(after - before) / count:.2f} KiB each, all closed {taken:.2f} s after their session ended"
            f" ({spent:.2f} s of CPU in the worker, the rest is this program's two ends of each)"
        )


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("it took too long")
        time.sleep(0.01)


def tables(sessions: int, agents: int) -> None:
    import edge_cost
    from dispatcher.feed import protocol
    from tests.support.edge_feed import agent_row, session_row

    def part(kind, rows, first, last):
        return protocol.encode(
            {"type": "snapshot", "first": first, "last": last, "agents": [], "sessions": [], kind: rows}
        )

    own = agent_row("alice", "tcp:127.0.0.1:9001")
    rows = [
        own,
        *(
            agent_row(
                f"user{i}", f"unix:/run/dispatcher/a/{i:012x}/s", uid=200000 + i, label=f"user{i}-0123456789ab"
            )
            for i in range(agents - 1)
        ),
    ]
    frames = [part("agents", rows[i : i + 5000], i == 0, False) for i in range(0, agents, 5000)]
    rows = [
        session_row(edge_cost.TOKEN, "alice"),
        *(session_row(f"token-{i}", f"user{i % (agents - 1)}") for i in range(sessions - 1)),
    ]
    frames += [part("sessions", rows[i : i + 5000], False, i + 5000 >= sessions) for i in range(0, sessions, 5000)]
    data = b"".join(frames)
    del rows, frames
    gc.collect()
    client, upstream = edge_cost.setup()
    context = client.context
    before = int(Path("/proc/self/statm").read_text().split()[1])
    start = time.process_time()
    decoder = protocol.Decoder()
    for position in range(0, len(data), 262144):
        for message in decoder.feed(data[position : position + 262144]):
            context.manager._on_message(message)
    spent = time.process_time() - start
    grown = (int(Path("/proc/self/statm").read_text().split()[1]) - before) * 4 / 1024
    assert len(context.tables.sessions) == sessions and len(context.tables.agents) == agents
    print(
        f"{sessions} sessions and {agents} agents ({len(data) / 1e6:.1f} MB of frames): loaded in {spent:.2f} s, {grown:.0f} MiB"
    )
    request, answer = edge_cost.SMALL

    def cost():
        start = time.process_time()
        for _ in range(20000):
            client.data_received(request)
            upstream.data_received(answer)
        return (time.process_time() - start) / 20000 * 1e6

    full = min(cost() for _ in range(5))
    empty = min(edge_cost.loop("small", 20000) for _ in range(5))
    print(f"a small request: {full:.2f} us with full tables, {empty:.2f} us with one session")
    start = time.process_time()
    context.manager.report()
    print(f"a report over {agents} agents: {(time.process_time() - start) * 1000:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--websockets", type=int, default=9000)
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--agents", type=int, default=10_000)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ["PYTHONPATH"] = str(ROOT)
    if args.websockets:
        websockets(args.websockets)
    if args.sessions:
        tables(args.sessions, args.agents)


if __name__ == "__main__":
    HOME = ROOT / ".venv"
    if (HOME / "bin/python").exists() and Path(
        sys.prefix
    ) != HOME:  # the project's own interpreter, whatever started this
        os.execv(HOME / "bin/python", [str(HOME / "bin/python"), __file__, *sys.argv[1:]])
    main()
