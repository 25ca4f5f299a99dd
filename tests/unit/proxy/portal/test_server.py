"""The portal as it is run: waitress on an inherited Unix socket, in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import socket, sys
from dispatcher.config.load import parse
from dispatcher.proxy.portal import app
app.serve(parse({"manager": {"run_dir": sys.argv[1]}}), socket.socket(fileno=int(sys.argv[2])))
"""


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("portal.test", timeout=10)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


@pytest.fixture
def served(short_tmp: Path):
    path = short_tmp / "portal.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(100)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(short_tmp), str(sock.fileno())], pass_fds=[sock.fileno()]
        )
    try:
        yield path, process
    finally:
        process.kill()
        process.wait()


def ask(connection: Connection, method: str, path: str, body: bytes | None = None, **headers: str):
    fields = {"Accept": "text/html"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, fields)
    response = connection.getresponse()
    return response, response.read().decode()


def test_it_serves_many_connections_and_says_when_the_manager_is_away(served) -> None:
    path, process = served
    connections = [Connection(path) for _ in range(150)]
    try:
        for connection in connections:
            response, text = ask(connection, "GET", "/auth/login", X_Forwarded_For="192.0.2.1")
            assert response.status == 200
            assert "<h1>Sign in</h1>" in text
            assert response.headers["Server"] is None
            assert response.headers["Connection"] is None  # kept alive, for the edge's pool
        first = connections[0]
        seed = response.headers["Set-Cookie"].partition(";")[0]
        token = re.search(r'name="token" value="([^"]+)"', text)[1]
        body = f"user=alice&password=x&token={token}".encode()
        kind = {"Content_Type": "application/x-www-form-urlencoded", "Cookie": seed}
        response, text = ask(first, "POST", "/auth/login", body, **kind)
        assert response.status == 503
        assert "manager" in text
        assert ask(first, "GET", "/auth/login", X_Forwarded_Proto="https", X_Long="x" * 40_000)[0].status == 200
        assert ask(connections[1], "POST", "/auth/login", b"x" * 100_000, **kind)[0].status == 413
        pss = re.search(r"Pss:\s+(\d+)", Path(f"/proc/{process.pid}/smaps_rollup").read_text())
        assert int(pss[1]) < 50 * 1024, "the portal has grown"
    finally:
        for connection in connections:
            connection.close()


def test_many_threads_are_there_before_they_are_needed(served) -> None:
    """Password checks wait for the manager; pages in between must not wait for them."""
    path, process = served
    with contextlib.closing(Connection(path)) as connection:
        ask(connection, "GET", "/auth/login")
    deadline = time.monotonic() + 5
    while len(list(Path(f"/proc/{process.pid}/task").iterdir())) < 65 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) > 64
