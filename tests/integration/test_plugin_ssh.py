"""Sockets forwarded by ssh, with a real sshd."""

import os
import socket
import socketserver
import threading
import time

import pytest

from dispatcher.plugin import Deadline, DeadlineExceeded, SshMultiplexer, Unavailable
from dispatcher.testing.kit import eventually
from tests.support.sshd import Sshd

pytestmark = pytest.mark.root


class Greeter(socketserver.ThreadingTCPServer):
    """A TCP server that sends one word to every connection."""

    daemon_threads = True

    def __init__(self, word: bytes) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(word)

        super().__init__(("127.0.0.1", 0), Handler)
        self.target = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def sshd():
    sshd = Sshd()
    yield sshd
    sshd.close()


@pytest.fixture
def greet():
    servers = []

    def greet(word):
        servers.append(Greeter(word))
        return servers[-1].target

    yield greet
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(sshd, short_tmp):
    made = []

    def connect(destination="root@127.0.0.1", **arguments):
        options = [*sshd.options, "-p", str(sshd.port)]
        made.append(SshMultiplexer(destination, short_tmp / "control", options=options, **arguments))
        return made[-1]

    yield connect
    for one in made:
        one.close(Deadline(10))
        assert not one.pid


def received(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        try:
            sock.connect(str(path))
            return sock.recv(100)
        except OSError as error:
            return type(error)


def test_a_socket_leads_to_a_port_of_the_other_host(connect, greet, short_tmp):
    ssh, local = connect(), str(short_tmp / "alice")
    target = greet(b"alice")
    assert ssh.forward(local, target, Deadline(20))
    assert received(local) == b"alice"
    assert os.stat(local).st_mode & 0o777 == 0o660
    assert not ssh.forward(local, target, Deadline(20)), "it is there already"
    assert ssh.forward(local, greet(b"bob"), Deadline(20))
    assert received(local) == b"bob"
    ssh.cancel(local, Deadline(20))
    assert not os.path.lexists(local)
    ssh.cancel(local, Deadline(20))


def test_a_socket_leads_to_a_unix_socket_of_the_other_host(connect, short_tmp):
    ssh, local = connect(), str(short_tmp / "here")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short_tmp / "there"))
        server.listen()
        ssh.forward(local, str(short_tmp / "there"), Deadline(20))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(local)
            server.settimeout(10)
            server.accept()[0].close()


def test_the_next_instance_uses_the_same_connection(connect, greet, short_tmp):
    first, local, target = connect(), str(short_tmp / "s"), greet(b"hello")
    first.forward(local, target, Deadline(20))
    second = connect()
    second.ensure(Deadline(20))
    assert second.pid == first.pid != 0
    assert received(local) == b"hello"
    assert second.forward(local, target, Deadline(20))
    assert received(local) == b"hello"


def test_a_socket_that_was_removed_is_made_again(connect, greet, short_tmp):
    ssh, local, target = connect(), str(short_tmp / "s"), greet(b"hello")
    ssh.forward(local, target, Deadline(20))
    os.unlink(local)
    assert ssh.forward(local, target, Deadline(20))
    assert received(local) == b"hello"


def test_a_lost_connection_is_made_again(connect, greet, sshd, short_tmp):
    ssh, local, target = connect(), str(short_tmp / "s"), greet(b"hello")
    ssh.forward(local, target, Deadline(20))
    sshd.stop()
    try:
        assert eventually(lambda: ssh.pid == 0, 10)
        with pytest.raises(Unavailable, match="cannot be reached through ssh"):
            ssh.forward(local, target, Deadline(10))
        assert received(local) is ConnectionRefusedError
    finally:
        sshd.start()
    assert eventually(lambda: connected(ssh), 10)
    assert ssh.forward(local, target, Deadline(20))
    assert received(local) == b"hello"


def connected(ssh):
    try:
        ssh.ensure(Deadline(5))
    except Unavailable:
        return False
    return True


def test_a_refused_sign_in_names_the_reason_and_the_command_to_try(connect):
    with pytest.raises(Unavailable) as caught:
        connect("nobody-there@127.0.0.1").ensure(Deadline(20))
    assert "Permission denied" in caught.value.why
    assert "`ssh nobody-there@127.0.0.1 true`" in caught.value.fix


def test_a_missing_program_is_named(connect):
    with pytest.raises(Unavailable, match="openssh-client"):
        connect(program="/nowhere/ssh").ensure(Deadline(20))


def test_a_host_that_does_not_answer_takes_no_longer_than_the_deadline(short_tmp):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        ssh = SshMultiplexer("root@127.0.0.1", short_tmp / "control", options=["-F", "none", "-p", port])
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            ssh.ensure(Deadline(0.5))
        assert time.monotonic() - began < 3
