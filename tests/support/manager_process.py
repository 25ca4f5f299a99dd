"""The manager's real listeners on a supervisor in memory, in the test's own process."""

from __future__ import annotations

import socket
from contextlib import contextmanager

from dispatcher.client.manager_client import ManagerClient
from dispatcher.config.load import parse
from dispatcher.feed.protocol import Decoder, encode
from dispatcher.manager import app
from tests.support.fake_supervisor import FakeSupervisor


@contextmanager
def manager_in(directory, monkeypatch, **tables):
    """Yield a started manager below `directory`; `tables` are those of the configuration.

    :param monkeypatch: None: with a real supervisor.
    """
    if monkeypatch is not None:
        monkeypatch.setattr(app, "Supervisor", lambda *, clock, **_: FakeSupervisor(clock))
    places = {"run_dir": str(directory / "r"), "state_dir": str(directory / "s")}
    config = parse(tables | {"manager": places | tables.get("manager", {})})
    manager = app.Manager(config)
    manager.start()
    try:
        yield manager
    finally:
        manager.close()


@contextmanager
def client_of(manager, socket_name="manager_socket", **options):
    """Yield a client of one of the manager's sockets."""
    client = ManagerClient(f"unix://{getattr(manager.paths, socket_name)}", **options)
    try:
        yield client
    finally:
        client.close()


class Worker:
    """An edge worker's side of the feed, reading when asked."""

    def __init__(self, path, *, hello=True, version=1, timeout=10.0, **more):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        self.sock.connect(str(path))
        self.decoder = Decoder()
        self.waiting = []
        if hello:
            self.send(type="hello", version=version, pid=4242, **more)

    def send(self, **message):
        self.sock.sendall(encode(message))

    def read(self):
        """Return the next message that is no ping, None at the end."""
        while True:
            while not self.waiting:
                data = self.sock.recv(1 << 20)
                if not data:
                    return None
                self.waiting += self.decoder.feed(data)
            message = self.waiting.pop(0)
            if message["type"] != "ping":
                return message

    def until(self, wanted):
        """Return the first message for which `wanted` is true."""
        while (message := self.read()) is not None:
            if wanted(message):
                return message
        raise AssertionError("the feed ended before")

    def snapshot(self):
        """Return hello, agents and sessions by key."""
        hello, agents, sessions = self.read(), {}, {}
        while True:
            part = self.read()
            assert part["type"] == "snapshot", part
            agents.update((row["name"], row) for row in part["agents"])
            sessions.update((row["sha256"], row) for row in part["sessions"])
            if part["last"]:
                return hello, agents, sessions

    def close(self):
        self.sock.close()
