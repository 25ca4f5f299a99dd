#!/usr/bin/env python3
"""Measure what one request costs the edge's own code, without sockets, so that a busy machine does not matter.

    bench/edge_cost.py                    microseconds of CPU per request, best of several runs
    bench/edge_cost.py --instructions     instructions per request, by callgrind (valgrind must be installed)

The client's and the upstream's transports are stand-ins; everything between them is the real edge.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("EDGE_COST_OF", str(ROOT)))

MANY = 2500
TOKEN = "abcdefghijklmnopqrstuvwxyz0123456789abcdefg"
SMALL = (
    f"GET / HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nCookie: dispatcher={TOKEN}\r\n\r\n".encode(),
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Wed, 25 Nov 2026 21:13:48 GMT\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 100\r\nConnection: keep-alive\r\n\r\n" + b"x" * 100,
)
BROWSER = (
    (
        "GET /api/contents/%d?content=0 HTTP/1.1\r\nHost: apps.example.org\r\nConnection: keep-alive\r\n"
        'sec-ch-ua: "Chromium";v="130", "Not?A_Brand";v="99"\r\nsec-ch-ua-platform: "Linux"\r\n'
        "X-XSRFToken: 2|aa|bb|123\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/130.0.0.0 Safari/537.36\r\nContent-Type: application/json\r\nAccept: */*\r\n"
        "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Dest: empty\r\n"
        "Referer: http://apps.example.org/lab/tree/%d\r\nAccept-Encoding: gzip, deflate, br\r\n"
        f"Accept-Language: en-US,en;q=0.9\r\nCookie: dispatcher={TOKEN}; _xsrf=2|aa|bb|123; u=2|1:0|10:1\r\n\r\n"
    ),
    b"HTTP/1.1 200 OK\r\nServer: TornadoServer/6.4\r\nContent-Type: application/json\r\n"
    b"Date: Wed, 25 Nov 2026 21:13:48 GMT\r\nX-Content-Type-Options: nosniff\r\n"
    b"Content-Security-Policy: frame-ancestors 'self'; report-uri /api/security/csp-report; default-src 'none'\r\n"
    b'Access-Control-Allow-Origin: \r\nEtag: "3f786850e387550fdab836ed7e6dc881de23001b"\r\nContent-Length: 200\r\n\r\n'
    + b"x"
    * 200,
)


def mixed(number):
    """Return a request and an answer as `bench/edge_compare` has them in its workload `mixed`."""
    noise = hashlib.md5(b"%d" % number).hexdigest()
    request = (
        f"GET /m/app/{number * 7 % 400}/items HTTP/1.1\r\nHost: apps.example.org\r\n"
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0.0.0 Safari/537.36\r\n"
        f"Accept: application/json;v={number}\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n"
        "Accept-Language: en-US,en;q=0.9\r\nSec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: cors\r\n"
        f"X-Client-Data: {noise[:24]}\r\nReferer: http://apps.example.org/m/app/{number * 11 % 400}/view?step={number}\r\n"
        f'If-None-Match: "{noise}"\r\n'
        f"If-Modified-Since: Sat, 28 Nov 2026 {number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02} GMT\r\n"
        f"X-XSRF-Token: 2|{noise[:8]}|{noise}\r\ntraceparent: 00-{noise}-{noise[:16]}-01\r\n"
        f"Cookie: dispatcher={TOKEN}; theme=dark; app={noise}\r\n\r\n"
    )
    body = '{"answer": "of the upstream", "id": "%s", "filler": "%s"}' % (noise, "x" * 71)
    answer = (
        "HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Wed, 25 Nov 2026 21:13:48 GMT\r\nContent-Type: application/json\r\n"
        f'Content-Length: {len(body)}\r\nConnection: keep-alive\r\nETag: "{noise}"\r\nX-Trace-Id: {noise}\r\n'
        f"Set-Cookie: app={noise}; Path=/; HttpOnly\r\nCache-Control: private, max-age=0\r\n"
        f"X-Content-Type-Options: nosniff\r\nVary: Accept-Encoding, Cookie\r\n\r\n{body}"
    )
    return request.encode(), answer.encode()


class Transport:
    """A stand-in: takes everything at once."""

    def __init__(self):
        self.written = 0

    def write(self, data):
        self.written += len(data)

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 40000) if name == "peername" else default

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def close(self):
        pass


CLOSE = (SMALL[0][:-2] + b"Connection: close\r\n\r\n", SMALL[1])


def setup():
    from dispatcher.config.load import parse
    from dispatcher.proxy.edge.net.access_log import AccessLog
    from dispatcher.proxy.edge.net.connection import Connection
    from dispatcher.proxy.edge.routing.settings import Settings
    from dispatcher.proxy.edge.net.upstream import Upstream
    from dispatcher.proxy.edge.worker import Worker
    from tests.support.edge_feed import agent_row, session_row

    worker = Worker(Settings(parse({})), "/nowhere", "/nowhere", AccessLog(None))
    message = {
        "type": "change",
        "agents": [agent_row("alice", "tcp:127.0.0.1:9001")],
        "sessions": [session_row(TOKEN, "alice")],
    }
    worker._on_message(message)
    agent = worker.context.tables.agents["alice"]
    upstream = Upstream(worker.context, agent)
    upstream.connection_made(Transport())
    agent.idle.append(upstream)
    client = Connection(worker.clients, worker.events)
    client.connection_made(Transport())
    return client, upstream


def loop(kind, count):
    client, upstream = setup()
    if kind == "connect":
        return connections(client.clients, upstream, count)
    if kind == "mixed":
        some = [
            mixed(number) for number in range(MANY)
        ]  # no more than fit into the cache, as those of a real worker do
        pairs = [some[number % MANY] for number in range(count)]
    elif kind == "small":
        pairs = [SMALL] * count
    else:
        pairs = [((BROWSER[0] % (i % 50, i % 7)).encode(), BROWSER[1]) for i in range(count)]
    take_request, take_answer = client.data_received, upstream.data_received
    start = time.process_time()
    for request, answer in pairs:
        take_request(request)
        take_answer(answer)
    spent = time.process_time() - start
    if kind in {"small", "mixed"}:
        assert client.transport.written > count * 150, "the answers did not get through"
    return spent / count * 1e6


def connections(clients, upstream, count):
    """A connection for each request, as the listener takes it: with the kernel's sockets, whose cost is subtracted."""
    import socket

    from dispatcher.proxy.edge.net.listener import Listener

    class Loop:
        def call_soon(self, callback):
            pass

        def call_later(self, seconds, callback):
            pass

    clients.context.loop = Loop()
    with socket.socket() as sock:
        listener = Listener(clients, sock)
    request, answer = CLOSE
    spent = nothing = 0.0
    for _ in range(count):
        near, far = socket.socketpair()
        near.sendall(request)
        fd = far.detach()
        start = time.process_time()
        listener._begin(fd, "127.0.0.1")
        upstream.data_received(answer)
        listener._report_closed()
        spent += time.process_time() - start
        got = near.recv(4096)
        near.close()
        near, far = socket.socketpair()
        near.sendall(request)
        fd = far.detach()
        start = time.process_time()
        os.read(fd, 4096)
        os.write(fd, got)
        os.close(fd)
        nothing += time.process_time() - start
        near.close()
    assert got.startswith(b"HTTP/1.1 200 OK") and clients.context.counters.connections == count + 1, (
        "the answers did not get through"
    )
    return (spent - nothing) / count * 1e6


def instructions(kind, few=500, many=MANY):
    counts = []
    for count in (few, many):
        with tempfile.NamedTemporaryFile() as out:
            subprocess.run(
                [
                    "valgrind",
                    "--tool=callgrind",
                    f"--callgrind-out-file={out.name}",
                    sys.executable,
                    __file__,
                    "--loop",
                    kind,
                    str(count),
                ],
                check=True,
                capture_output=True,
            )
            counts.append(int(re.search(r"^(?:summary|totals): (\d+)", Path(out.name).read_text(), re.M)[1]))
    return (counts[1] - counts[0]) / (many - few)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--loop", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--profile", help="profile one kind by function")
    parser.add_argument("--kinds", default="small,connect,browser,mixed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.loop:
        loop(args.loop[0], int(args.loop[1]))
        return
    if args.profile:
        import cProfile

        cProfile.runctx("loop(kind, 20000)", globals(), {"kind": args.profile}, sort="tottime")
        return
    result = {}
    for kind in args.kinds.split(","):
        if args.instructions:
            result[kind] = round(instructions(kind))
        else:
            result[kind] = round(min(loop(kind, 20000) for _ in range(7)), 2)
    if args.json:
        print(json.dumps(result))
        return
    for kind, value in result.items():
        print(f"{kind:8} {value} {'instructions' if args.instructions else 'us'} per request")


if __name__ == "__main__":
    HOME = ROOT / ".venv"
    if (HOME / "bin/python").exists() and Path(
        sys.prefix
    ) != HOME:  # the project's own interpreter, whatever started this
        os.execv(HOME / "bin/python", [str(HOME / "bin/python"), __file__, *sys.argv[1:]])
    main()
