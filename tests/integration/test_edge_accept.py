"""New connections: what becomes of one that its first request does not end."""

from __future__ import annotations

import errno
import gc
import os
import resource
import socket
import ssl
import threading
import time
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.edge_harness import (
    COOKIE,
    Connection,
    Edge,
    Reader,
    descriptors,
    echo,
    eventually,
    read_all,
    saying,
)

HOST = b"Host: app.test\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + COOKIE
LAST = GET + b"Connection: close\r\n\r\n"


def test_a_connection_for_each_request_leaves_nothing_open():
    with Edge() as edge:
        assert edge.ask(LAST).startswith(b"HTTP/1.1 200 OK\r\n")
        before = descriptors()
        for _ in range(200):
            answer = edge.ask(LAST)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nConnection: close\r\n" in answer
        assert edge.agent.opened == 1, "a new client is no reason for a new connection to the agent"
        eventually(lambda: edge.worker.clients.open == 0)
        assert descriptors() <= before + 2


def test_the_first_request_of_many_on_one_connection():
    with Edge() as edge, edge.connect() as sock:
        reader = Reader(sock)
        for number in range(5):
            sock.sendall(GET + b"X-Number: %d\r\n\r\n" % number)
            answer = reader.answer()
            assert answer.status == 200 and b"X-Number: %d" % number in answer.body


def test_all_at_once_on_a_new_connection():
    with Edge() as edge, edge.connect() as sock:
        sock.sendall((GET + b"\r\n") * 20 + LAST)
        reader = Reader(sock)
        for _ in range(21):
            assert reader.answer().status == 200
        assert sock.recv(10) == b""


def test_a_client_that_says_nothing_at_first():
    with Edge() as edge, edge.connect() as sock:
        time.sleep(0.3)
        sock.sendall(LAST)
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_a_body_longer_than_the_first_read():
    with Edge() as edge:
        body = bytes(range(256)) * 4000
        answer = edge.ask(
            b"POST / HTTP/1.1\r\n"
            + HOST
            + COOKIE
            + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        assert answer.endswith(body)


def test_a_body_behind_its_head_waits_for_nothing():
    # No connection to the agent is there yet, and the body comes when there is one.
    with Edge() as edge, edge.connect() as sock:
        start = time.monotonic()
        sock.sendall(b"POST / HTTP/1.1\r\n" + HOST + COOKIE + b"Content-Length: 100000\r\n\r\n")
        time.sleep(0.02)
        sock.sendall(b"x" * 100_000)
        assert Reader(sock).answer().body.endswith(b"x" * 100_000)
        assert time.monotonic() - start < 0.2, "nobody looked at the connection for a while"


def test_bytes_after_the_last_request_do_not_cost_the_answer():
    # Closing a socket that holds unread bytes resets the connection, and the answer would be lost with it.
    def script(connection: Connection) -> None:
        connection.head()
        time.sleep(0.1)
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n" + b"x" * 50000)

    for _ in range(5):
        with Edge(script) as edge, edge.connect() as sock:
            sock.sendall(LAST)
            time.sleep(0.03)
            sock.sendall(b"\r\n")
            time.sleep(0.2)
            assert read_all(sock).endswith(b"x" * 50000)


def test_a_large_answer_on_a_new_connection_to_a_slow_reader():
    size = 30_000_000
    sent = [0]

    def script(connection: Connection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(300):
            connection.send(b"x" * 100_000)
            sent[0] += 100_000

    with Edge(script) as edge, edge.connect() as sock:
        sock.sendall(LAST)
        time.sleep(1)
        assert sent[0] < size, "the agent is held back"
        assert len(read_all(sock).partition(b"\r\n\r\n")[2]) == size


def test_a_client_that_leaves_while_its_agent_thinks_is_noticed():
    left = threading.Event()

    def script(connection: Connection) -> None:
        connection.head()
        connection.sock.settimeout(5)
        if connection.sock.recv(1) == b"":
            left.set()

    with Edge(script) as edge:
        sock = edge.connect()
        sock.sendall(LAST)
        time.sleep(0.05)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        assert left.wait(3)
        eventually(lambda: edge.worker.clients.open == 0)


def test_a_client_that_is_gone_before_it_is_answered():
    with Edge(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")) as edge:
        for _ in range(50):
            sock = edge.connect()
            sock.sendall(LAST)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        eventually(lambda: edge.worker.clients.open == 0)
        assert edge.ask(LAST).startswith(b"HTTP/1.1 200")


def test_a_new_connection_of_a_session_that_ends():
    from tests.support.edge_harness import TOKEN

    def script(connection: Connection) -> None:
        connection.head()
        connection.sock.recv(1)

    with Edge(script) as edge, edge.connect() as sock:
        sock.sendall(LAST)
        eventually(lambda: edge.agent.heads)
        edge.feed.remove(tokens=(TOKEN,))
        assert read_all(sock) == b""
        eventually(lambda: edge.worker.clients.open == 0)


def test_accepting_goes_on_after_descriptors_ran_out():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Edge() as edge:
        assert edge.ask(LAST).startswith(b"HTTP/1.1 200")
        waiting = socket.socket()
        waiting.settimeout(10)
        waiting.bind(("127.0.0.1", 0))
        gc.collect()  # what earlier tests left would free descriptors later
        free = os.dup(waiting.fileno())  # the lowest number that is free: with it as limit, none is
        os.close(free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            waiting.connect(("127.0.0.1", edge.port))
            waiting.sendall(LAST)
            waiting.settimeout(0.5)
            try:
                got = waiting.recv(1)
            except TimeoutError:
                got = None
            assert got is None, "there was no descriptor for it"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        waiting.settimeout(10)
        assert read_all(waiting).startswith(b"HTTP/1.1 200"), "it waited in the queue and was taken"
        waiting.close()


def test_a_fault_of_the_edge_ends_only_the_connection_that_met_it():
    with Edge(echo) as edge:
        real = edge.worker.look_up

        def broken(*_: object) -> bool:
            raise ZeroDivisionError

        edge.worker.look_up = broken  # type: ignore[method-assign]
        unknown = LAST.replace(b"dispatcher=token-of-alice", b"dispatcher=token-of-nobody")
        assert edge.ask(unknown) == b""
        edge.worker.look_up = real  # type: ignore[method-assign]
        assert edge.ask(LAST).startswith(b"HTTP/1.1 200")
        eventually(lambda: edge.worker.clients.open == 0)
        assert [type(error.get("exception")) for error in edge.errors] == [ZeroDivisionError]
        edge.errors.clear()


class Poor:
    """A loop whose kernel has no watch left for another connection (epoll_ctl(2), ENOSPC)."""

    def __init__(self, loop):
        self._loop = loop

    def __getattr__(self, name):
        return getattr(self._loop, name)

    async def connect_accepted_socket(self, *_values, **_more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_connection_that_the_loop_cannot_take_is_let_go():
    with Edge() as edge:
        rich = edge.worker.context.loop
        edge.worker.context.loop = Poor(rich)
        with edge.connect() as sock:
            sock.sendall(b"GET / HT")  # the rest is the loop's matter
            assert sock.recv(1) == b""
        eventually(lambda: edge.worker.clients.open == 0)
        edge.worker.context.loop = rich
        assert edge.get().status == 200


def test_plain_http_on_the_tls_port_is_redirected(tmp_path):
    certificate, key = Authority(tmp_path).issue("server", ["127.0.0.1"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with Edge(echo, tls=tls) as edge:
        for method, status in ((b"GET", 301), (b"POST", 308)):
            head = method + b" /a?b HTTP/1.1\r\nHost: apps.test:8443\r\n" + COOKIE + b"Content-Length: 0\r\n\r\n"
            with socket.create_connection(("127.0.0.1", edge.port), 5) as sock:
                sock.sendall(head[:1])
                time.sleep(0.05)
                sock.sendall(head[1:])
                answer = read_all(sock)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert b"\r\nLocation: https://apps.test:8443/a?b\r\n" in answer and b"Connection: close" in answer
        assert not edge.agent.heads
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        with trusting.wrap_socket(socket.create_connection(("127.0.0.1", edge.port), 5)) as sock:
            sock.sendall(LAST)
            assert read_all(sock).startswith(b"HTTP/1.1 200"), "and TLS is served"


def test_little_waits_in_the_kernel_for_a_client_that_does_not_read():
    """Without a bound the kernel takes `net.ipv4.tcp_wmem` for each connection, 4 MiB by default."""

    def endless(connection):
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 900000000\r\n\r\n")
        while True:
            connection.send(b"x" * 262144)

    def queued(port):
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, here, there, _, queues, *_ = line.split()
            if int(here[-4:], 16) == edge.port and int(there[-4:], 16) == port:
                return int(queues.partition(":")[0], 16)
        return 0

    with Edge(endless) as edge, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", edge.port))
        port = sock.getsockname()[1]
        sock.sendall(b"GET / HTTP/1.1\r\nHost: app.test\r\n" + COOKIE + b"\r\n")
        before, now = -1, 0
        while now != before or not now:
            before = now
            time.sleep(0.5)
            now = queued(port)
        assert now < 1 << 20
