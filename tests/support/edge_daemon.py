"""The whole proxy daemon as a process, with a feed and an agent by hand."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from tests.support.edge_feed import FeedServer, agent_row, session_row
from tests.support.edge_harness import TOKEN, Agent, Script, echo, eventually

ROOT = Path(__file__).parent.parent.parent
MAIN = """
import os, sys
from dispatcher.config.load import load
from dispatcher.plugin.errors import DispatcherError
from dispatcher.proxy import daemon
os.environ["DISPATCHER_CONFIG"] = sys.argv[1]
try:
    sys.exit(daemon.run(load()))
except DispatcherError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]


class Daemon:
    """A proxy daemon; `write` changes its configuration file."""

    def __init__(
        self, script: Script = echo, *, state: str = "running", start: bool = True, label: str = "", **proxy: Any
    ) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="edged-", dir="/tmp"))
        self.dir.chmod(0o755)
        self.port = free_port()
        self.agent = Agent(script)
        self.feed = FeedServer(str(self.dir / "feed.sock"))
        self.feed.agents["alice"] = agent_row("alice", self.agent.endpoint, state, label=label)
        row = session_row(TOKEN, "alice")
        self.feed.sessions[row["sha256"]] = row
        self.feed.start()
        self.proxy = {"listen": [f"127.0.0.1:{self.port}"], "drain_timeout": 3, **proxy}
        self.log = open(self.dir / "log", "ab")  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = None
        self.write()
        if start:
            self.start()

    def write(self, **proxy: Any) -> None:
        self.proxy |= proxy
        data = {"manager": {"run_dir": str(self.dir), "state_dir": str(self.dir / "state")}, "proxy": self.proxy}
        (self.dir / "dispatcher.toml").write_text(tomli_w.dumps(data))

    def start(self, *, wait: bool = True, **kw: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(self.dir / "dispatcher.toml")],
            cwd=ROOT, stderr=self.log, start_new_session=True, **{"stdout": self.log, **kw},
        )  # fmt: skip
        if wait:
            eventually(lambda: self.workers() and self.said("listening"), 20)

    def said(self, words: str) -> bool:
        return words in (self.dir / "log").read_text()

    def text(self) -> str:
        return (self.dir / "log").read_text()

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[int]:
        """Return the pids of workers that are on the feed."""
        alive = {child.pid for child in self.children()}
        return [frame["pid"] for frame in self.feed.of_type("hello") if frame["pid"] in alive]

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def connect(self, timeout: float = 10.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def close(self) -> None:
        process = self.process
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self.feed.stop()
        self.agent.close()
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def user_ids(pid: int) -> set[int]:
    """Return the real, effective, saved and file-system user ids of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return set(map(int, line.split()[1:]))
    raise AssertionError


def status(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


__all__ = ["Daemon", "free_port", "status", "user_ids"]
