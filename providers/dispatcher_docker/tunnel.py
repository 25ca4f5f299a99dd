"""The way to an engine behind `ssh://`: one ssh that forwards the engine's socket, and agents' ports, to here.

Touches the program `ssh`, its control socket and the forwarded sockets.  docker-py's own ssh knows no deadlines; a
forwarded Unix socket is an engine like any other.  The same connection carries the agents' traffic, encrypted, to
sockets that only the manager and the proxy can use.  The ssh outlives the manager, as agents do: a fresh instance
finds it by its control socket.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dispatcher.plugin import ConfigError, Deadline, DeadlineExceeded, Unavailable

_REMOTE_SOCKET = "/var/run/docker.sock"
_OPTIONS = (
    "BatchMode=yes",
    "ExitOnForwardFailure=yes",
    "StreamLocalBindUnlink=yes",
    "StreamLocalBindMask=0117",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ConnectTimeout=10",
    "ControlPersist=no",
    "ForwardAgent=no",
    "ForwardX11=no",
)


class Tunnel:
    """One ssh to the engine's host.

    :param url: ``ssh://[USER@]HOST[:PORT][/PATH/OF/THE/SOCKET]``; :param directory: private, with a short path.
    """

    def __init__(self, url: str, directory: Path) -> None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not host or host.startswith("-") or (parts.username or "").startswith("-") or parts.password:
            raise ConfigError(
                f"Bad url of the Docker engine {url!r}",
                fix="write ssh://USER@HOST, the key in ssh's configuration",
            )
        self.url = url
        self._destination = f"{unquote(parts.username)}@{host}" if parts.username else host
        self._port = parts.port
        self._remote = unquote(parts.path) if parts.path not in {"", "/"} else _REMOTE_SOCKET
        here = directory / hashlib.sha256(url.encode()).hexdigest()[:8]
        self._directory = here
        self.socket = here / "engine"
        self._control = here / "control"
        self._lock = threading.Lock()
        self._pid = 0
        self._forwards: dict[str, str] = {}

    def ensure(self, deadline: Deadline) -> None:
        """Have the tunnel up.

        :raises Unavailable: ssh cannot connect; it says why.
        """
        if self._alive():
            return
        with self._alone(deadline):
            if not self._alive() and not self._adopt(deadline):
                self._start(deadline)

    @contextmanager
    def _alone(self, deadline: Deadline) -> Iterator[None]:
        if not self._lock.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded("The Docker engine was not reached in time", why=f"ssh to {self.url} hangs")
        try:
            yield
        finally:
            self._lock.release()

    def forward(self, path: str, target: str, deadline: Deadline) -> None:
        """Make connections to the Unix socket `path` arrive at `target`, HOST:PORT on the engine's host."""
        if self._forwards.get(path) == target and self._alive():
            return
        self.ensure(deadline)
        with self._alone(deadline):
            known = self._forwards.pop(path, target)
            self._control_command("cancel", f"{path}:{known}", deadline, must=False)
            self._control_command("forward", f"{path}:{target}", deadline, must=True)
            self._forwards[path] = target

    def cancel(self, path: str, deadline: Deadline) -> None:
        """Forward a socket no more."""
        with self._alone(deadline):
            target = self._forwards.pop(path, None)
            if target and self._alive():
                self._control_command("cancel", f"{path}:{target}", deadline, must=False)

    def _control_command(self, what: str, forward: str, deadline: Deadline, *, must: bool) -> None:
        command = ["ssh", "-S", str(self._control), "-O", what]
        command += ["-o", "StreamLocalBindUnlink=yes", "-o", "StreamLocalBindMask=0117", "-L", forward, "--"]
        try:
            done = subprocess.run(
                [*command, self._destination],
                capture_output=True,
                text=True,
                timeout=max(0.1, min(10.0, deadline.remaining())),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(
                f"ssh to {self.url} does not answer", why=str(error), fix="look at the network"
            ) from error
        if must and done.returncode:
            raise Unavailable(
                "The agent's port cannot be forwarded", why=_words(done.stderr), fix=f"look at sshd of {self.url}"
            )

    def _alive(self) -> bool:
        if not self._pid:
            return False
        try:
            state = Path(f"/proc/{self._pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            state = "X"
        if state in "ZX":
            self._pid = 0
            self._forwards.clear()
            return False
        return True

    def _adopt(self, deadline: Deadline) -> bool:
        """Take over the ssh of an earlier manager."""
        if not self._control.exists():
            return False
        done = subprocess.run(
            ["ssh", "-S", str(self._control), "-O", "check", "--", self._destination],
            capture_output=True,
            text=True,
            timeout=max(0.1, min(5.0, deadline.remaining())),
            check=False,
        )
        match = re.search(r"pid=(\d+)", done.stderr + done.stdout)
        if done.returncode or not match or not _connects(self.socket):
            return False
        self._pid = int(match[1])
        return True

    def _start(self, deadline: Deadline) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in (self._control, self.socket):
            leftover.unlink(missing_ok=True)
        self._forwards.clear()
        command = ["ssh", "-N", "-T", "-M", "-S", str(self._control)]
        for option in _OPTIONS:
            command += ["-o", option]
        if self._port:
            command += ["-p", str(self._port)]
        command += ["-L", f"{self.socket}:{self._remote}", "--", self._destination]
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                )
            except OSError as error:
                raise Unavailable(
                    "The Docker engine cannot be reached",
                    why=f"ssh: {error.strerror}",
                    fix="install openssh-client",
                ) from error
            threading.Thread(target=process.wait, name="docker-ssh", daemon=True).start()
            while not _connects(self.socket):
                if process.returncode is not None or deadline.expired:
                    process.kill()
                    said.seek(0)
                    raise self._failed(_words(said.read().decode(errors="replace")), deadline)
                time.sleep(0.02)
        self._pid = process.pid

    def _failed(self, why: str, deadline: Deadline) -> Unavailable:
        fix = f"try: ssh {self._destination} true, as the manager's user (keys and known_hosts are its own)"
        if deadline.expired and not why:
            return DeadlineExceeded(f"ssh to {self.url} did not connect in time", fix=fix)
        return Unavailable("The Docker engine cannot be reached", why=f"{self.url}: {why}", fix=fix, retry_after=5)


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            return False
    return True


def _words(text: str) -> str:
    return " ".join(text.split())[:400] or "ssh ended without a word"
