"""Helpers for tests with a real Docker engine: images, a relay that can fail, a private engine that can be killed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from dispatcher.testing.driver import Driver
from dispatcher.testing.base import Contract
from dispatcher.testing.kit import Kit
from dispatcher_docker.options import DockerOptions
from dispatcher_docker.provider import DockerProvider
from tests.support.stopped import stop

ROOT = Path(__file__).parent.parent.parent


def docker(*arguments: str, host: str = "", check: bool = True, timeout: float = 60, **kwargs) -> str:
    """Run the `docker` program; return its output."""
    command = ["docker", *(["--host", host] if host else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@functools.cache
def images() -> None:
    """Build the test images, once in a process."""
    subprocess.run([ROOT / "tests/machine/build-images"], check=True, timeout=280)


def leftovers(installation: str, host: str = "") -> set[str]:
    """Return what an engine has of an installation, asked by the `docker` program."""
    label = f"label=dispatcher.installation={installation}"
    found = set()
    for what, command in {
        "container": ["ps", "-a", "--format", "{{.Names}}", "--filter", label],
        "helper": ["ps", "-a", "--format", "{{.Names}}", "--filter", f"label=dispatcher.helper={installation}"],
        "network": ["network", "ls", "--format", "{{.Name}}", "--filter", label],
        "volume": ["volume", "ls", "--format", "{{.Name}}", "--filter", label],
    }.items():
        found |= {f"{what} {name}" for name in docker(*command, host=host).split()}
    return found


def remove_all(installation: str, host: str = "") -> None:
    """Remove everything of an installation from an engine."""
    for thing in sorted(leftovers(installation, host)):
        what, name = thing.split(" ", 1)
        command = {"network": ["network", "rm"], "volume": ["volume", "rm", "-f"]}.get(what, ["rm", "-f", "-v"])
        docker(*command, name, host=host, check=False)


def forget_images(prefix: str) -> None:
    """Remove every name of an image that begins so."""
    form = "{{.Repository}} {{.Tag}} {{.Digest}}"
    for line in docker("images", "--digests", "--format", form).splitlines():
        repository, tag, digest = line.split()
        if repository.startswith(prefix):
            name = f"{repository}:{tag}" if tag != "<none>" else f"{repository}@{digest}"
            docker("rmi", "-f", name, check=False)


class Relay:
    """A Unix socket in front of an engine's: it can be down (refuses) or silent (takes, never answers)."""

    def __init__(self, target: str = "/var/run/docker.sock") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="relay-", dir="/tmp"))
        self.path = self.directory / "s"
        self.target = target
        self.silent = False
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._listen()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(256)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        pair = {client: server, server: client}
        with self._lock:
            self._connections |= set(pair)
        try:
            server.connect(self.target)
            while pair:
                ready, _, _ = select.select(list(pair), [], [], 30)
                for one in ready:
                    block = one.recv(65536)
                    while self.silent:
                        time.sleep(0.02)
                    if block:
                        pair[one].sendall(block)
                    else:
                        other = pair.pop(one)
                        with contextlib.suppress(OSError):
                            other.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            pass
        finally:
            for one in (client, server):
                with self._lock:
                    self._connections.discard(one)
                one.close()

    @contextlib.contextmanager
    def broken(self, how: str):
        """Be down or silent for a while."""
        if how == "silent":
            self.silent = True
            try:
                yield
            finally:
                self.silent = False
            return
        assert self._listener
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink()
        self._hang_up()
        try:
            yield
        finally:
            self._listen()

    def _hang_up(self) -> None:
        with self._lock:
            for one in self._connections:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.silent = False
        assert self._listener
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._hang_up()
        shutil.rmtree(self.directory, ignore_errors=True)


class PrivateEngine:
    """An engine of the test's own, its containers without networks, that may be stopped and killed.

    It has a bridge of its own: with `--bridge=none` a dockerd removes the interface docker0 of all others.
    """

    def __init__(self, *options: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="dkr-", dir="/tmp"))
        self.url = f"unix://{self.directory}/docker.sock"
        self.options = options
        self.bridge = f"dkr{secrets.token_hex(4)}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 60) -> None:
        """Start it and wait until it answers."""
        (self.directory / "docker.pid").unlink(missing_ok=True)
        subprocess.run(["ip", "link", "add", self.bridge, "type", "bridge"], check=False, capture_output=True)
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    "dockerd",
                    f"--host={self.url}",
                    f"--data-root={self.directory}/data",
                    f"--exec-root={self.directory}/exec",
                    f"--pidfile={self.directory}/docker.pid",
                    f"--bridge={self.bridge}",
                    "--iptables=false",
                    "--storage-driver=overlay2",
                    *self.options,
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        end = time.monotonic() + seconds
        while not docker("info", "--format", "{{.ServerVersion}}", host=self.url, check=False):
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"dockerd did not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def load(self, *names: str) -> None:
        """Copy images from the machine's engine."""
        save = subprocess.Popen(["docker", "save", *names], stdout=subprocess.PIPE)
        subprocess.run(["docker", "--host", self.url, "load"], stdin=save.stdout, check=True, capture_output=True)
        assert save.stdout
        save.stdout.close()
        assert save.wait() == 0

    def signal(self, number: int) -> None:
        """Signal the engine alone; after SIGSTOP it answers nothing any more."""
        assert self.process
        if number == signal.SIGSTOP:
            stop(self.process.pid)
        else:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self.process
        self.process.kill()
        self.process.wait()
        # The kernel ends its containerd with it.  Where PID 1 reaps nobody that stays a zombie, and the next
        # dockerd would take the number in the pid file for a containerd that lives.
        note = self.directory / "exec/containerd/containerd.pid"
        with contextlib.suppress(OSError, ValueError):
            pid = int(note.read_text())
            end = time.monotonic() + 5
            while _state(pid) not in "ZX" and time.monotonic() < end:
                time.sleep(0.02)
            note.unlink()

    def close(self) -> None:
        """Remove its containers, end it and everything it started, remove its files."""
        if self.process:
            with contextlib.suppress(Exception):
                self.signal(signal.SIGCONT)
                if self.process.poll() is not None:
                    self.start()
                names = docker("ps", "-aq", host=self.url, check=False).split()
                if names:
                    docker("rm", "-f", *names, host=self.url, check=False)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # A crash leaves shims behind, and the containers that are their children: neither ends when it is asked to.
        for pid in self._containerd():
            for one in (*_children(pid), pid):
                with contextlib.suppress(OSError):
                    os.kill(one, signal.SIGKILL)
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            where = line.split(" ")[1]
            if where.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "-l", where], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _containerd(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode(errors="replace")
                    if f"{self.directory}/" in line and int(entry.name) != os.getpid():
                        found.append(int(entry.name))
        return found


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def inspect(name: str, host: str = "") -> dict:
    """Return the engine's inspection of a container."""
    return json.loads(docker("inspect", name, host=host))[0]


PROBE = {"image": "dispatcher-test/probe", "command": ["python3", "/probe.py", "--unix", "{socket}"]}
PORTED = {
    "image": "dispatcher-test/probe",
    "command": ["python3", "/probe.py", "--tcp", "0.0.0.0:{port}"],
    "port": 8080,
}


class DockerWorld(Kit):
    """Agents of the Docker provider, and what the tests ask of them; everything is gone after `close`."""

    def __init__(self, url: str = "", patience: float = 30.0, **options) -> None:
        contract = Contract()
        contract.patience, contract.app_options = patience, lambda: dict(PROBE)
        super().__init__(contract)
        self.host = url
        self.options = DockerOptions.model_validate({"url": url or "unix:///var/run/docker.sock", **options})
        self.driver = self.sibling = self.another()

    def another(self) -> Driver:
        """Return a fresh instance, as a restarted manager makes one."""
        provider = DockerProvider(context=self.context, options=self.options)
        return self.contract.drive(provider)

    def make(self, agent: str, *, options=None, **changes):
        """Return a spec; `options` are added to the probe's."""
        base = options if options and ("image" in options or "build" in options) else {**PROBE, **(options or {})}
        return self.spec(agent, options=base, **changes)

    def run(self, agent: str, *, options=None, **changes):
        """Start an agent and wait for its probe."""
        return self.start(self.driver, self.make(agent, options=options, **changes))

    def observe(self, agent):
        return self.driver.observe(getattr(agent, "handle", agent))

    def close(self) -> None:
        try:
            super().close()
        finally:
            remove_all(self.installation, self.host)
