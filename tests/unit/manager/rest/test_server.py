"""What the HTTP server of a listener refuses, over a real socket."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import time
from functools import partial

import pytest

from dispatcher.manager.rest import server as module
from dispatcher.manager.rest.server import MAX_HEAD, Server


class Log:
    """Remembers what was logged, as level, event and values."""

    def __init__(self):
        self.lines = []

        for level in ("debug", "info", "warning", "error", "exception"):
            setattr(self, level, partial(self._add, level))

    def _add(self, level, event, **values):
        self.lines.append((level, event, values))


@pytest.fixture
def log(monkeypatch):
    log = Log()
    monkeypatch.setattr(module, "_log", log)
    return log


def app(environ, start_response):
    if environ["PATH_INFO"] == "/exit":
        raise SystemExit(9)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


@pytest.fixture
def path(short_tmp):
    path = str(short_tmp / "s")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    server = Server(sock, app, threads=1)
    server.start()
    yield path
    server.close()
    sock.close()


def ask(path, data):
    """Return all that the server sends until it closes the connection."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(data)
        received = b""
        while part := sock.recv(65536):
            received += part
        return received


@pytest.mark.parametrize(
    ("line", "status"), [(b"*", b"400"), (b"/ HTTP/1.1\r\nContent-Length: 70000", b"413"), (b"/", b"200")]
)
def test_an_answer_to_head_has_no_body(path, log, caplog, line, status):
    line += b"" if b" " in line else b" HTTP/1.1"
    answer = ask(path, b"HEAD " + line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status) and answer.endswith(b"\r\n\r\n")
    ask(path, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    gc.collect()  # then asyncio logs the exception of a task that nobody asked for
    assert not log.lines and not caplog.records


def test_an_application_that_ends_the_program_ends_no_thread(path, log):
    for _ in range(2):
        assert ask(path, b"GET /exit HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 500 ")
    assert ask(path, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").endswith(b"ok")
    assert [event for _, event, _ in log.lines] == ["a request failed"] * 2


def test_a_length_that_is_said_in_two_ways_is_refused(path):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = ask(path, head + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b"\r\nConnection: close\r\n" in answer


def test_a_head_that_is_complete_and_too_large_is_refused(path):
    assert ask(path, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * MAX_HEAD + b"\r\n\r\n").startswith(
        b"HTTP/1.1 431 "
    )


def test_refused_connections_are_logged_once_with_the_limit_that_applied(path, log, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 0)
    for _ in range(5):
        with contextlib.suppress(OSError):
            assert ask(path, b"GET / HTTP/1.1\r\n\r\n") == b""
    assert log.lines == [("warning", "too many connections", {"most": 0, "address": "", "count": 1})]


def test_one_address_does_not_fill_the_log(log, monkeypatch):
    monkeypatch.setattr(module, "MAX_OF_ADDRESS", 0)
    monkeypatch.setattr(module, "QUIET", 0.2)
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    server = Server(sock, app, 1, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    server.start()

    def knock():
        with socket.create_connection(address, 5) as client:
            assert client.recv(1) == b""

    for _ in range(3):
        knock()
    time.sleep(0.25)
    knock()
    monkeypatch.setattr(module, "MAX_OF_ADDRESS", 9)
    for _ in range(3):
        with socket.create_connection(address, 5) as client:
            client.sendall(b"nonsense" * 10)
            while client.recv(100):
                pass
    server.close()
    sock.close()
    seen = [(event, values["count"]) for _, event, values in log.lines]
    limit = "too many connections from one address"
    assert seen == [(limit, 1), (limit, 3), ("a TLS handshake failed", 1)]
    assert log.lines[0][2]["most"] == 0
