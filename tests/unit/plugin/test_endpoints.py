"""Opening an agent's endpoint without trusting the agent."""

import os
import socket

import pytest

from dispatcher.plugin.endpoints import checked_unix_path, connect
from dispatcher.plugin.errors import InsecureEndpoint
from dispatcher.plugin.model import Endpoint


@pytest.fixture
def listener(short_tmp):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_tmp / "s"))
        sock.listen(8)
        yield sock


def test_a_socket_of_the_right_owner_is_connected(short_tmp, listener):
    with connect(Endpoint.unix(short_tmp / "s"), os.geteuid(), 5) as sock:
        assert sock.gettimeout() == 5
        peer, _ = listener.accept()
        with peer:
            sock.sendall(b"hello")
            assert peer.recv(5) == b"hello"


def test_a_socket_of_anybody_will_do_where_the_provider_vouches(short_tmp, listener):
    connect(Endpoint.unix(short_tmp / "s"), None, 5).close()


def test_another_s_socket_is_refused(short_tmp, listener):
    with pytest.raises(InsecureEndpoint, match=f"has owner {os.geteuid()}, not {os.geteuid() + 1}"):
        connect(Endpoint.unix(short_tmp / "s"), os.geteuid() + 1, 5)


def test_a_link_to_somebody_s_socket_is_refused(short_tmp, listener):
    (short_tmp / "link").symlink_to(short_tmp / "s")
    with pytest.raises(InsecureEndpoint, match="not a socket"):
        connect(Endpoint.unix(short_tmp / "link"), os.geteuid(), 5)


def test_a_linked_directory_is_refused(short_tmp, listener):
    (short_tmp / "dir").symlink_to(short_tmp, target_is_directory=True)
    with pytest.raises(OSError, match="Not a directory|Too many levels"):
        connect(Endpoint.unix(short_tmp / "dir" / "s"), os.geteuid(), 5)


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("x"), lambda path: path.mkdir(), lambda path: os.mkfifo(path)]
)
def test_what_is_no_socket_is_refused(short_tmp, make):
    make(short_tmp / "x")
    with pytest.raises(InsecureEndpoint, match="not a socket"):
        connect(Endpoint.unix(short_tmp / "x"), os.geteuid(), 5)


def test_what_was_checked_is_what_is_connected(short_tmp, listener):
    """Swapping the path after the check gains nothing."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(short_tmp / "other"))
        other.listen(1)
        other.settimeout(0.1)
        with checked_unix_path(str(short_tmp / "s"), os.geteuid()) as path:
            (short_tmp / "s").unlink()
            (short_tmp / "s").symlink_to(short_tmp / "other")
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                listener.accept()[0].close()
        with pytest.raises(TimeoutError):
            other.accept()


def test_no_socket_and_nobody_who_listens_are_told_apart(short_tmp):
    with pytest.raises(FileNotFoundError):
        connect(Endpoint.unix(short_tmp / "none"), None, 5)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_tmp / "dead"))
    with pytest.raises(ConnectionRefusedError):
        connect(Endpoint.unix(short_tmp / "dead"), os.geteuid(), 5)


def test_tcp(free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        connect(Endpoint.tcp("127.0.0.1", free_port), None, 5).close()
    with pytest.raises(ConnectionRefusedError):
        connect(Endpoint.tcp("127.0.0.1", free_port), None, 5)


def test_no_descriptor_is_left_behind(short_tmp, listener):
    (short_tmp / "link").symlink_to(short_tmp / "s")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        connect(Endpoint.unix(short_tmp / "s"), os.geteuid(), 5).close()
        listener.accept()[0].close()
        with pytest.raises(InsecureEndpoint):
            connect(Endpoint.unix(short_tmp / "link"), os.geteuid(), 5)
    assert len(os.listdir("/proc/self/fd")) == before
