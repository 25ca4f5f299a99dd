"""The client's connections: kept, replaced once the server has closed them, and requests that may be repeated."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dispatcher.client.transport import Reply, Transport, parse
from dispatcher.plugin.errors import ManagerUnreachable

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Server:
    """Answers on a Unix socket as a script says: for each connection, the answer to each of its requests.

    The connection is closed after its last answer; an answer of None closes it in place of one.
    """

    def __init__(self, path, script):
        self.requests = []
        self.closed = [threading.Event() for _ in script]
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        for number, answers in enumerate(self._script):
            try:
                sock, _ = self._listener.accept()
            except OSError:  # the test is over
                return
            with sock:
                for answer in answers:
                    head = b""
                    while b"\r\n\r\n" not in head and (piece := sock.recv(65536)):
                        head += piece
                    if not head:
                        break
                    self.requests.append((number, head.split(b" ")[0].decode()))
                    if answer is not None:
                        sock.sendall(answer)
            self.closed[number].set()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)  # closing does not end an `accept`
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()


@pytest.fixture
def connect(short_tmp):
    """Return a server that follows a script, and a transport to it."""
    made = []

    def connect(*script):
        path = short_tmp / "x.sock"
        server, transport = Server(path, script), Transport(f"unix://{path}")
        made.extend((transport, server))
        return server, lambda method, **more: transport.request(method, "/", None, 10.0, **more)

    yield connect
    for one in made:
        one.close()


def test_a_connection_is_kept(connect):
    server, request = connect([ANSWER, ANSWER])
    assert request("GET").body == request("POST").body == b"{}"
    assert server.requests == [(0, "GET"), (0, "POST")]


def test_one_that_the_server_has_closed_is_not_used_again(connect):
    server, request = connect([ANSWER], [ANSWER])
    request("POST")
    assert server.closed[0].wait(10)
    request("POST")
    assert server.requests == [(0, "POST"), (1, "POST")]


def test_one_that_was_idle_for_long_is_not_used_again(connect, monkeypatch):
    monkeypatch.setattr("dispatcher.client.transport.MAX_IDLE", 0.05)
    server, request = connect([ANSWER, None], [ANSWER])
    request("POST")
    time.sleep(0.1)
    request("POST")
    assert server.requests[-1] == (1, "POST")


@pytest.mark.parametrize(("method", "again"), [("GET", False), ("PUT", False), ("DELETE", False), ("POST", True)])
def test_a_request_that_meets_a_closing_connection_is_repeated_on_a_new_one(connect, method, again):
    server, request = connect([ANSWER, None], [ANSWER])
    request("GET")
    assert request(method, again=again).status == 200
    assert server.requests == [(0, "GET"), (0, method), (1, method)]


def test_it_is_repeated_also_while_another_thread_opens_a_connection(short_tmp):
    """The portal's threads share the connections: what one of them does says nothing about another one's."""
    path = short_tmp / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(2)
        transport = Transport(f"unix://{path}")

        def ask(target):
            return transport.request("GET", target, None, 3.0)

        def answer(sock):
            sock.recv(65536)
            sock.sendall(ANSWER)

        with ThreadPoolExecutor() as threads:
            first = threads.submit(ask, "/first")
            kept, _ = listener.accept()
            answer(kept)
            first.result(10)
            repeated = threads.submit(ask, "/repeated")
            assert kept.recv(65536)
            other = threads.submit(ask, "/other")
            fresh, _ = listener.accept()
            kept.close()
            again, _ = listener.accept()
            for sock in (again, fresh):
                answer(sock)
            assert [one.result(10).status for one in (repeated, other)] == [200, 200]
            transport.close()
            again.close()
            fresh.close()


def test_a_request_that_may_have_had_its_effect_is_not_repeated(connect):
    server, request = connect([ANSWER, None], [ANSWER])
    request("GET")
    with pytest.raises(ManagerUnreachable):
        request("POST")
    assert server.requests == [(0, "GET"), (0, "POST")]


def test_a_socket_may_have_any_path_up_to_the_kernels_limit(short_tmp):
    odd = short_tmp / "a b%2Fc#d?e@ü"
    odd.mkdir()
    server = Server(odd / "x.sock", [[ANSWER]])
    transport = Transport(f"unix://{odd}/x.sock")
    assert transport.request("GET", "/", None, 10.0).body == b"{}"
    transport.close()
    server.close()
    with pytest.raises(ManagerUnreachable, match="at most 107 bytes .make a link") as caught:
        Transport(f"unix://{short_tmp}/{'x' * 108}").request("GET", "/", None, 10.0)
    assert "its log" not in str(caught.value)


def test_an_answer_of_any_length_is_not_read(connect, monkeypatch):
    monkeypatch.setattr("dispatcher.client.transport.MAX_ANSWER", 1000)
    _, request = connect([b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 1001])
    with pytest.raises(ManagerUnreachable, match="too long"):
        request("GET")


@pytest.mark.parametrize("body", [b"[" * 200_000, b"[]", b'{"a": ', b"\xff"], ids=["deep", "list", "cut", "bytes"])
def test_an_answer_that_is_no_json_object_comes_from_another_program(body):
    with pytest.raises(ManagerUnreachable, match="Another program"):
        parse(Reply(200, body, ""), "https://manager.test")


@pytest.mark.parametrize("answer", [ANSWER, ANSWER[:-2] + b"x" * 100])
def test_an_answer_that_trickles_is_given_up(short_tmp, answer):
    path = short_tmp / "x.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    done = threading.Event()

    def trickle():
        sock, _ = listener.accept()
        with sock:
            sock.recv(65536)
            for byte in answer * 100:
                if done.wait(0.1):
                    return
                try:
                    sock.sendall(bytes([byte]))
                except OSError:
                    return

    thread = threading.Thread(target=trickle)
    thread.start()
    transport = Transport(f"unix://{path}", whole=0.5)
    began = time.monotonic()
    try:
        with pytest.raises(ManagerUnreachable) as caught:
            transport.request("GET", "/agents", None, 0.5)
    finally:
        done.set()
        thread.join()
        transport.close()
        listener.close()
    assert time.monotonic() - began < 3
    assert "timed out" in caught.value.why
