"""The log collector of the provider `subprocess`."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from dispatcher_subprocess import log_collector

from dispatcher.plugin import NEW_CONNECTIONS, NEW_CONNECTIONS_BURST

from tests.conftest import ROOT


def test_the_collector_survives_without_descriptors(tmp_path):
    """Of a message that arrives when it has no descriptor left it gets the text alone, or a part of the descriptors."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10)); "
    address = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        command = [
            sys.executable,
            "-c",
            f"{limit}runpy.run_path({log_collector.__file__!r}, run_name='__main__')",
            ROOT,
        ]
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
    """The collector imports next to nothing, to save memory."""
    assert (log_collector.QUERIES, log_collector.BURST) == (NEW_CONNECTIONS, NEW_CONNECTIONS_BURST)
