"""A manager's feed for tests and benchmarks of the edge: the real protocol over a real socket, rows by hand."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from dispatcher.feed import protocol
from dispatcher.plugin.deadline import boottime


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def user_id(user: str) -> int:
    return int(digest(user)[:6], 16)


def agent_row(name: str, endpoint: str | None, state: str = "running", **more: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "user": name.partition(":")[0],
        "app": "demo",
        "label": "",
        "state": state,
        "endpoint": endpoint,
        "uid": None,
        "stage": "",
        "detail": "",
        "fraction": None,
        "failed": None,
    }
    return {"user_id": user_id(more.get("user", row["user"])), **row, **more}


def session_row(token: str, agent: str, ttl: float | None = 3600.0, **more: Any) -> dict[str, Any]:
    user = agent.partition(":")[0]
    row = {"sha256": digest(token), "user": user, "agent": agent, "agents": [agent], "ttl": ttl, **more}
    return {"user_id": user_id(row["user"]), **row}


class FeedServer:
    """Listens on `path`; every worker gets the snapshot, then what `change` says; `frames` is what workers sent."""

    def __init__(self, path: str, *, mode: int = 0o666) -> None:
        self.path = path
        self.agents: dict[str, dict[str, Any]] = {}
        self.sessions: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, dict[str, Any]] = {}
        self.secret_sessions: dict[str, dict[str, Any]] = {}  # only found by a lookup
        self.frames: list[dict[str, Any]] = []
        self.answer_lookups = True
        self.on_wake: Callable[[str], None] | None = None
        self._mode = mode
        self._peers: list[socket.socket] = []
        self._lock = threading.RLock()
        self._heard = threading.Condition(self._lock)
        self._sock: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._closed = False

    def start(self) -> FeedServer:
        self._closed = False
        sock = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        sock.bind(self.path)
        os.chmod(self.path, self._mode)
        sock.listen(64)
        self._sock = sock
        self._acceptor = threading.Thread(target=self._accept, args=(sock,), daemon=True)
        self._acceptor.start()
        threading.Thread(target=self._ping, daemon=True).start()
        return self

    def stop(self) -> None:
        self._closed = True
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            if self._acceptor is not None:
                self._acceptor.join(10)
            self._sock.close()
        with self._lock:
            peers, self._peers = self._peers, []
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()

    def add(
        self, *, agents: tuple[Any, ...] = (), sessions: tuple[Any, ...] = (), tokens: tuple[Any, ...] = ()
    ) -> None:
        """Add or replace rows and tell all workers."""
        with self._lock:
            for row in agents:
                self.agents[row["name"]] = row
            for row in sessions:
                self.sessions[row["sha256"]] = row
            for row in tokens:
                self.tokens[row["sha256"]] = row
            change = {"agents": list(agents), "sessions": list(sessions), "tokens": list(tokens)}
            self._send({"type": "change", **change})

    def remove(self, *, agents: tuple[str, ...] = (), tokens: tuple[str, ...] = ()) -> None:
        with self._lock:
            gone = [digest(token) for token in tokens]
            for name in agents:
                self.agents.pop(name, None)
            for sha256 in gone:
                self.sessions.pop(sha256, None)
                self.tokens.pop(sha256, None)
            change = {"agents_gone": list(agents), "sessions_gone": gone, "tokens_gone": gone}
            self._send({"type": "change", **change})

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 10.0) -> dict[str, Any]:
        """Return the first frame that is wanted, waiting for it."""
        end = time.monotonic() + seconds
        with self._heard:
            while True:
                for frame in self.frames:
                    if wanted(frame):
                        return frame
                left = end - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"no such frame among {[f['type'] for f in self.frames]}")
                self._heard.wait(left)

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        with self._lock:
            return [frame for frame in self.frames if frame["type"] == kind]

    def _send(self, message: dict[str, Any]) -> None:
        data = protocol.encode(message)
        for peer in list(self._peers):
            with contextlib.suppress(OSError):
                peer.sendall(data)

    def _ping(self) -> None:
        while not self._closed:
            time.sleep(2)
            with self._lock:
                self._send({"type": "ping"})

    def _accept(self, sock: socket.socket) -> None:
        while not self._closed:
            try:
                peer, _ = sock.accept()
            except OSError:
                return
            if self._closed:
                peer.close()
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with self._lock:
            if self._closed:
                peer.close()
                return
            hello = {
                "type": "hello",
                "version": protocol.VERSION,
                "installation": "0a1b2c3d",
                "now": boottime(),
            }
            rows = protocol.MAX_ROWS
            agents, sessions = list(self.agents.values()), list(self.sessions.values())
            parts = [(agents[i : i + rows], []) for i in range(0, len(agents), rows)]
            parts += [([], sessions[i : i + rows]) for i in range(0, len(sessions), rows)]
            parts = parts or [([], [])]
            try:
                peer.sendall(protocol.encode(hello))
                for number, (some_agents, some_sessions) in enumerate(parts):
                    peer.sendall(
                        protocol.encode(
                            {
                                "type": "snapshot",
                                "first": number == 0,
                                "last": number == len(parts) - 1,
                                "agents": some_agents,
                                "sessions": some_sessions,
                                "tokens": list(self.tokens.values()) if number == 0 else [],
                            }
                        )
                    )
            except OSError:
                peer.close()
                return
            self._peers.append(peer)
        decoder = protocol.Decoder()
        while True:
            try:
                data = peer.recv(65536)
            except OSError:
                data = b""
            if not data:
                with self._lock:
                    if peer in self._peers:
                        self._peers.remove(peer)
                peer.close()
                return
            for frame in decoder.feed(data):
                self._frame(peer, frame)

    def _frame(self, peer: socket.socket, frame: dict[str, Any]) -> None:
        with self._heard:
            self.frames.append(frame)
            self._heard.notify_all()
            if frame["type"] == "lookup" and self.answer_lookups:
                row = self.sessions.get(frame["sha256"]) or self.secret_sessions.get(frame["sha256"])
                agents = [self.agents[row["agent"]]] if row and row["agent"] in self.agents else []
                answer = {"type": "session", "sha256": frame["sha256"], "session": row, "agents": agents}
                with contextlib.suppress(OSError):
                    peer.sendall(protocol.encode(answer))
        if frame["type"] == "wake" and self.on_wake is not None:
            self.on_wake(frame["agent"])
