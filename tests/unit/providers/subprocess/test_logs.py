"""Log files of the provider `subprocess`: rotation by the log collector, reading from the end."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from dispatcher_subprocess import log_collector
from dispatcher_subprocess.logs import log_file, remove
from dispatcher_subprocess.log_collector import Log

from dispatcher.plugin import NEW_CONNECTIONS, NEW_CONNECTIONS_BURST, Deadline, read_lines


def read(path, tail):
    return list(read_lines(path, newest=1, tail=tail, follow=False, deadline=Deadline(1)))


@pytest.fixture
def path(tmp_path):
    return log_file(tmp_path)


def test_files_are_rotated_and_bounded(path, tmp_path):
    log = Log(str(path), 1000, 3)
    for number in range(500):
        log.write(b"%06d\n" % number)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["output.log", "output.log.1", "output.log.2"]
    assert read(path, 3) == [b"000497", b"000498", b"000499"]
    everything = read(path, 10_000)
    assert everything[-1] == b"000499" and 280 < len(everything) < 430
    assert everything[1:] == [b"%06d" % number for number in range(int(everything[1]), 500)]


def test_one_write_larger_than_all_files(path, tmp_path):
    log = Log(str(path), 1000, 2)
    log.write(b"x" * 10_000 + b"end\n")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2000
    assert read(path, 1)[-1].endswith(b"xend")


def test_a_single_file_is_emptied(path):
    log = Log(str(path), 100, 1)
    for number in range(100):
        log.write(b"%03d\n" % number)
    assert path.stat().st_size <= 100
    assert read(path, 1) == [b"099"]


def test_a_restarted_collector_goes_on_where_the_file_ends(path):
    Log(str(path), 1000, 3).write(b"one\n")
    Log(str(path), 1000, 3).write(b"two\n")
    assert read(path, 10) == [b"one", b"two"]


def test_a_link_in_the_place_of_the_file_is_not_followed(path, tmp_path):
    target = tmp_path / "target"
    path.symlink_to(target)
    log = Log(str(path), 1000, 3)
    log.write(b"secret\n")
    assert not target.exists() and log.dropped == 7
    assert read(path, 10) == []


@pytest.mark.parametrize(
    "text, tail, expected",
    [
        (b"", 5, []),
        (b"a\nb\nc\n", 0, []),
        (b"a\nb\nc\n", 2, [b"b", b"c"]),
        (b"a\nb\nc", 2, [b"b", b"c"]),
        (b"a\nb\nc", 1, [b"c"]),
        (b"a\n\n\n", 2, [b"", b""]),
        (b"a\r\nb\r\n", 5, [b"a", b"b"]),
        (b"x" * 70_000 + b"\n", 5, [b"x" * 65_536, b"x" * 4_464]),
    ],
)
def test_tails(path, text, tail, expected):
    path.write_bytes(text)
    assert read(path, tail) == expected


def test_tail_zero_of_an_unfinished_line_yields_nothing(path):
    path.write_bytes(b"half")
    assert read(path, 0) == []


def test_removal_takes_all_files(path, tmp_path):
    log = Log(str(path), 10, 4)
    for _ in range(10):
        log.write(b"123456789\n")
    log.close()
    remove(path)
    remove(path)
    assert list(tmp_path.iterdir()) == []


def test_the_collector_survives_without_descriptors(tmp_path):
    """Of a message that arrives when it has no descriptor left it gets the text alone, or a part of the descriptors."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10)); import runpy, sys; "
    address = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, "-c", f"{limit}runpy.run_path({log_collector.__file__!r}, run_name='__main__')"]
        collector = subprocess.Popen(command, stdin=listener)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as manager, contextlib.ExitStack() as stack:
        manager.connect(address)
        ends = []
        for name in ("a", "b"):
            pipe = os.pipe()
            for fd in pipe:
                stack.callback(os.close, fd)
            udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
            stack.callback(udp.close)
            stack.callback(tcp.close)
            message = os.fsencode(tmp_path / name) + b"\0001000\0002"
            socket.send_fds(manager, [message], [pipe[0], udp.fileno(), tcp.fileno()])
            ends.append(pipe[1])
        os.write(ends[0], b"it lives\n")
        end = time.monotonic() + 5
        while not (tmp_path / "a").exists() or not (tmp_path / "a").read_bytes():
            assert collector.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    collector.kill()
    collector.wait()


def test_malformed_name_servers_are_passed_over(tmp_path, monkeypatch):
    """One such line must not end the collector of all agents."""
    monkeypatch.setattr(log_collector, "RESOLV_CONF", str(tmp_path / "resolv.conf"))
    (tmp_path / "resolv.conf").write_bytes(
        b"nameserver a..b\nnameserver \xff\xe9.1\nnameserver "
        + b"a" * 70
        + b"\nnameserver 192.0.2.1\nnameserver ::1\n"
    )
    assert [address[:2] for _, address in log_collector.name_servers()] == [("192.0.2.1", 53), ("::1", 53)]
    (tmp_path / "resolv.conf").write_bytes(b"nameserver a..b\n")
    assert [address for _, address in log_collector.name_servers()] == [("127.0.0.1", 53)]


@pytest.fixture
def asking(monkeypatch):
    """A collector with an agent's name server, the agent's socket, and a host's name server that says nothing."""
    with contextlib.ExitStack() as stack:
        silent, agent, udp = (
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3)
        )
        tcp, listener = stack.enter_context(socket.socket()), stack.enter_context(socket.socket())
        for sock in (silent, udp, tcp, listener):
            sock.bind(("127.0.0.1", 0))
        tcp.listen()
        listener.listen()
        agent.connect(udp.getsockname())
        monkeypatch.setattr(log_collector, "name_servers", lambda: [(socket.AF_INET, silent.getsockname())])
        collector = log_collector.Collector(listener)
        stack.callback(collector.poll.close)
        names = collector.names["a"] = log_collector.Names(collector, udp, tcp)
        yield collector, names, agent
        while names.pending:
            names._forget(next(iter(names.pending)))


def ask(names, agent, count):
    for _ in range(count):
        agent.send(b"question")
        names._query(0)


def test_queries_without_answers_are_bounded(asking, monkeypatch):
    _, names, agent = asking
    monkeypatch.setattr(log_collector, "PENDING", 3)
    ask(names, agent, 5)
    assert len(names.pending) == 3


def test_queries_without_answers_expire_without_another_query(asking, monkeypatch):
    collector, names, agent = asking
    monkeypatch.setattr(log_collector, "ANSWER", 0.2)
    monkeypatch.setattr(log_collector, "SWEEP", 0.05)
    monkeypatch.setattr(log_collector, "IDLE", 0.3)
    ask(names, agent, 3)
    collector.managers[-1] = None  # a manager is connected
    sweep = names.sweep
    monkeypatch.setattr(names, "sweep", lambda now: (sweep(now), names.pending or collector.managers.clear()))
    serving = threading.Thread(target=collector.run, daemon=True)
    serving.start()
    serving.join(5)
    assert not serving.is_alive()
    assert not names.pending and names.turn == 1


def test_a_readiness_without_an_answer_keeps_the_query(asking):
    _, names, agent = asking
    ask(names, agent, 1)
    names._answer(next(iter(names.pending)))
    assert len(names.pending) == 1


def test_queries_are_bounded_as_connections_are():
    """The collector imports nothing of the project, to save memory."""
    assert (log_collector.QUERIES, log_collector.BURST) == (NEW_CONNECTIONS, NEW_CONNECTIONS_BURST)
