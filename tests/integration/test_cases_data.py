"""What people reported of comparable systems' data paths, through the real proxy to a real, sandboxed app.

Sizes are bounded: what matters (memory and descriptors stay flat) shows as well with 300 MB as with 5 GB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time

import pytest

from tests.support.cases_site import Site, app, frame, head_of
from tests.support.installation import until

pytestmark = [pytest.mark.bubblewrap, pytest.mark.xdist_group("cases")]
SIZE = 300_000_000
FLAT = 20_000_000  # bytes that a proxy may grow by, whatever passes


@pytest.fixture(scope="module")
def site():
    with Site(
        app() + app("loop", "environment = {CASE_LAST_WORDS = 'x'}", "max_restarts = 0"),
        extra='default_app = "web"',
    ) as site:
        site.add("alice")
        site.add("looper", "loop")
        yield site


@pytest.fixture(scope="module")
def alice(site):
    cookie = site.login("alice")
    site.app(cookie)
    return cookie


def rest(sock):
    text = b""
    while data := sock.recv(1 << 18):
        text += data
    return text


def test_a_large_download_leaves_memory_flat(site, alice):
    with site.open(f"/download/{SIZE}", alice, "Connection: close") as sock:
        head = head_of(sock)
        assert b"\r\nContent-Length: %d\r\n" % SIZE in head
        before, most, got, at = site.memory(), 0, 0, 0
        buffer = bytearray(1 << 20)
        while count := sock.recv_into(buffer):
            got += count
            if got - at > 20_000_000:
                at, most = got, max(most, site.memory())
    assert got == SIZE
    assert most - before < FLAT


def test_an_endless_body_for_head_reaches_no_client(site, alice):
    before = site.memory()
    with site.connect() as sock:
        sock.sendall(site.head("/download/100000000000", alice, method="HEAD"))
        assert b"\r\nContent-Length: 100000000000\r\n" in head_of(sock)
        sock.sendall(site.head("/after", alice, "Connection: close"))
        head, _, body = rest(sock).partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0]
    assert json.loads(body)["target"] == "/after"
    assert site.memory() - before < FLAT


@pytest.mark.parametrize("how", ["with its length", "in chunks"])
def test_a_large_upload_leaves_memory_flat_and_arrives_whole(site, alice, how):
    block, count = b"u" * (1 << 20), SIZE // 2 >> 20
    digest = hashlib.sha256()
    line = f"Content-Length: {count << 20}" if how == "with its length" else "Transfer-Encoding: chunked"
    with site.connect(60) as sock:
        sock.sendall(site.head("/", alice, line, "Connection: close", method="POST"))
        before, most = site.memory(), 0
        for number in range(count):
            digest.update(block)
            sock.sendall(block if how == "with its length" else b"100000\r\n" + block + b"\r\n")
            if number % 16 == 0:
                most = max(most, site.memory())
        if how == "in chunks":
            sock.sendall(b"0\r\n\r\n")
        got = json.loads(rest(sock).partition(b"\r\n\r\n")[2])
    assert (got["length"], got["sha256"]) == (count << 20, digest.hexdigest())
    assert most - before < FLAT


def test_upgrades_to_an_app_that_is_dead_leave_descriptors_flat(site, alice):
    """1,000 rather than 10,000: to an app that never came up, and to one that answers no upgrade."""
    cookie = site.login("looper")
    site.reach("looper", "failed")
    before = site.descriptors()
    for target, who, status in (("/ws", cookie, b" 503 "), ("/", alice, b" 200 ")):
        for _ in range(500):
            sock, head = site.upgrade(target, who)
            sock.close()
            assert status in head[:20]
    until("descriptors are as before", lambda: site.descriptors() <= before + 8, 10)


PATHS = [
    "/a%2Fb", "/a%2fb", "//a//b", "/a;b=c;d", "/a?b?c=?&&=", "/a?", "/%E4%BD%A0/%c3%a9", "/a/./b", "/a/%2e%2e/b", "/a+b%20c",
    "/" + "p" * 8000, "/a?q=" + "q" * 8000, "/!$&'()*+,=:@-._~", "/a%00b", "/authx/y", "/AUTH/y", "/[x]|^{}`\"<>",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=[path[:20] for path in PATHS])
def test_paths_arrive_byte_for_byte(site, alice, path):
    with site.open(path, alice, "Connection: close") as sock:
        head, _, body = rest(sock).partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0]
    assert json.loads(body)["target"] == path


def test_the_exchange_is_as_the_standard_says(site, alice):
    """RFC 9112: HEAD, Expect, pipelining, HTTP/1.0, close."""
    with site.connect() as sock:
        sock.sendall(site.head("/", alice, method="HEAD") + site.head("/second", alice, "Connection: close"))
        text = rest(sock)
    first, second = text.split(b"HTTP/1.1 ")[1:]
    assert first.endswith(b"\r\n\r\n")
    assert b"Content-Length: " in first
    assert json.loads(second.partition(b"\r\n\r\n")[2])["target"] == "/second"
    with site.connect() as sock:
        sock.sendall(
            site.head("/", alice, "Expect: 100-continue", "Content-Length: 3", "Connection: close", method="PUT")
        )
        assert head_of(sock).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"abc")
        assert json.loads(rest(sock).partition(b"\r\n\r\n")[2])["length"] == 3
    with site.connect() as sock:
        sock.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{site.port}\r\nCookie: {alice}\r\n\r\n".encode())
        assert json.loads(rest(sock).partition(b"\r\n\r\n")[2])["target"] == "/"
    for status in (204, 304):
        raw = f'HTTP/1.1 {status} X\r\nETag: "x"\r\n\r\n'.encode().hex()
        with site.connect() as sock:
            sock.sendall(site.head(f"/raw/{raw}", alice) + site.head("/after", alice, "Connection: close"))
            text = rest(sock)
            assert text.startswith(b"HTTP/1.1 %d " % status)
            assert b'"target": "/after"' in text


def test_a_stream_comes_as_it_is_made_and_a_silent_socket_stays(site, alice):
    """Ten minutes of silence are outlived by time-outs of seconds: see the edge's own tests; here it is 3 s."""
    with site.open("/sse", alice) as sock:
        head_of(sock)
        began, times = time.monotonic(), []
        while len(times) < 5:
            assert sock.recv(1000)
            times.append(time.monotonic() - began)
        assert times[-1] - times[0] > 0.5, "not held back and sent at once"
    sock, head = site.upgrade("/ws", alice)
    with sock:
        assert head.startswith(b"HTTP/1.1 101 ")
        time.sleep(3)
        sock.sendall(frame(b"still there"))
        assert sock.recv(100) == b"\x81\x0bstill there"


def test_clients_that_reset_in_the_middle_affect_no_other_client(site, alice):
    import socket
    import struct

    def reset(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    workers = [process.pid for process in site.workers()]
    before = site.descriptors()
    for _ in range(30):
        sock, _ = site.upgrade("/ws", alice)
        sock.sendall(frame(b"a whole frame")[:7])
        reset(sock)
        reset(site.open("/download/100000000", alice))
        sock = site.open("/", alice, "Content-Length: 1000")
        with contextlib.suppress(OSError):
            sock.sendall(b"half")
        reset(sock)
    assert site.web("GET", "/", Cookie=alice).status == 200
    assert [process.pid for process in site.workers()] == workers
    until("descriptors are as before", lambda: site.descriptors() <= before + 10, 10)
