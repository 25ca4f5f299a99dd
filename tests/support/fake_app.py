"""The app inside a fake agent: the probe's protocol with simulated results.

Only its listening socket and the agent's data directory are real.  Processes, other files and other sockets are
simulated, as an isolated agent would see them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dispatcher.plugin.model import AgentSpec, Endpoint, Network
from dispatcher.testing.probe import Handler, Probe

_SECRETS = "/run/secrets"
_STATUS = "CapPrm:\t{caps}\nCapEff:\t{caps}\nCapBnd:\t{caps}\nNoNewPrivs:\t{flag}\n"


class Died(BaseException):
    """The app ended in the middle of an answer; no `Exception`, so that nothing answers for it."""


class FakeApp(Probe):
    """One start of an app.

    :ivar log: takes a line of output; :ivar on_exit: called with the reason when the app ends by itself.
    """

    log: Callable[[bytes], None]
    on_exit: Callable[[str], None]

    def __init__(
        self,
        spec: AgentSpec,
        *,
        endpoint: Endpoint | None,
        environment: Mapping[str, str],
        data: Path,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.endpoint, self.environment, self.data, self.uid = endpoint, dict(environment), data, spec.uid
        self.secret_files = {name: value.encode() for name, value in spec.secrets.items()}
        self.stdin, self.stdin_ended = spec.stdin or b"", True
        limits = spec.app.limits
        self.limits = {"memory": limits.memory, "pids": limits.pids, "disk": limits.disk}
        self.cpus = limits.cpus or 1.0
        self.on_host_network = spec.app.network is Network.HOST
        self.start = secrets.token_hex(8)
        self.memory = 8 << 20
        self.cpu_seconds = 0.01
        self.privileged = False
        self.argv, self.cwd, self.umask = ("probe", *arguments), self.environment["DISPATCHER_DATA"], 0o007
        self.view: dict[str, bytes] = {}  # more files that this app can see, for providers broken on purpose
        self.awake = threading.Event()
        self.awake.set()
        self._ended = threading.Event()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._handler = type("FakeHandler", (Handler,), {"probe": self, "timeout": 30})

    def may_connect(self, to: str) -> bool:
        """Whether the app can connect to an endpoint."""
        return self.on_host_network and to.startswith("tcp:")

    # -- running -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start to listen, or end at once when the environment says so."""
        if "PROBE_EXIT" in self.environment:
            self.log(b"last words")
            self.end(f"exit code {self.environment['PROBE_EXIT']}")
            return
        if self.endpoint is None:
            return
        if self.endpoint.kind == "unix":
            Path(self.endpoint.path).unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.endpoint.path)
            if os.geteuid() == 0:
                os.chown(self.endpoint.path, self.uid, -1)
            listener.listen(128)
        else:
            listener = socket.create_server((self.endpoint.host, self.endpoint.port), backlog=128)
            self.endpoint = Endpoint.tcp(*listener.getsockname()[:2])
        self._listener = listener
        self.log(b"probe is ready")
        threading.Thread(target=self._accept, args=(listener,), daemon=True, name="fake-app").start()

    def end(self, reason: str = "") -> None:
        """End; with a reason it ended by itself."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.awake.set()
        if self._listener:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            if self.endpoint and self.endpoint.kind == "unix":
                Path(self.endpoint.path).unlink(missing_ok=True)
        with self.lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        if reason:
            self.on_exit(reason)

    def terminate(self) -> bool:
        """What SIGTERM does; whether the app ended."""
        if self.environment.get("PROBE_IGNORES_SIGTERM"):
            return False
        self._write("saved", b"signal 15\n")
        self.end()
        return True

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="fake-app").start()

    def _serve(self, connection: socket.socket) -> None:
        with self.lock:
            self._connections.add(connection)
        try:
            self._handler(connection, ("", 0), None)
        except (Died, OSError):
            pass
        finally:
            with self.lock:
                self._connections.discard(connection)
            connection.close()

    def _alive(self) -> None:
        self.awake.wait()
        if self._ended.is_set():
            raise Died

    # -- the probe's protocol ----------------------------------------------------------------------------

    def get(self, path: str, query: dict[str, str]) -> bytes:
        """Answer a GET of the probe."""
        self._alive()
        if path in {"/", "/count", "/stdin"}:
            return super().get(path, query)
        if path == "/id":
            about = f"uid={self.uid}\ngid={self.uid}\ngroups=\npid=1\nstart={self.start}\nhost=fake\n"
            return f"{about}cwd={self.cwd}\numask={self.umask:04o}\n".encode()
        if path == "/env":
            return b"".join(f"{name}={value}\0".encode() for name, value in self.environment.items())
        if path == "/argv":
            return b"".join(f"{word}\0".encode() for word in self.argv)
        if path == "/connect":
            if not self.may_connect(query["to"]):
                raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
            return b"connected\n"
        if path == "/socket":
            raise OSError(errno.EAFNOSUPPORT, "refused")
        return self._look(path, query["path"])

    def post(self, path: str, query: dict[str, str], body: bytes) -> bytes:
        """Answer a POST of the probe."""
        self._alive()
        if path == "/count":
            return super().post(path, query, body)
        if path == "/write":
            self._write(self._own(query["path"]), body)
        elif path == "/log":
            for _ in range(int(query.get("repeat", "1"))):
                self.log(body)
        elif path == "/memory":
            self.memory += int(query["bytes"])
            if self.limits["memory"] and self.memory > self.limits["memory"]:
                self.end("out of memory")
                raise Died
        elif path == "/fork":
            return f"{min(int(query['count']), self.limits['pids'] or 100_000)}\n".encode()
        elif path == "/burn":
            time.sleep(float(query["seconds"]))
            self.cpu_seconds += float(query["seconds"]) * min(1.0, self.cpus)
        elif path == "/heartbeat":
            threading.Thread(target=self._beat, args=(self._own(query["path"]),), daemon=True).start()
        elif path == "/exit":
            threading.Timer(0.05, self.end, (f"exit code {query['code']}",)).start()
        return b"done\n"

    def _look(self, path: str, wanted: str) -> bytes:
        name = wanted.removeprefix(f"{_SECRETS}/")
        if path == "/stat" and name in self.secret_files:
            return f"{self.uid} {self.uid} 400 {len(self.secret_files[name])}\n".encode()
        if wanted in self.view:
            return self.view[wanted]
        if path == "/list" and wanted == "/proc":
            return b"1\nself\n"
        if wanted == "/proc/self/status":
            caps, flag = ("000001ffffffffff", 0) if self.privileged else ("0" * 16, 1)
            return _STATUS.format(caps=caps, flag=flag).encode()
        if wanted == "/proc/1/environ":
            return self.get("/env", {})
        if wanted.startswith(f"{_SECRETS}/") and name in self.secret_files:
            return self.secret_files[name]
        target = self.data / self._own(wanted)
        if path == "/list":
            return "".join(f"{one}\n" for one in sorted(os.listdir(target))).encode()
        return target.read_bytes()

    def _own(self, wanted: str) -> str:
        root = self.environment["DISPATCHER_DATA"]
        if not wanted.startswith(f"{root}/"):
            raise PermissionError(errno.EACCES, "not yours")
        return wanted[len(root) + 1 :]

    def _write(self, name: str, body: bytes) -> None:
        used = sum(path.stat().st_size for path in self.data.rglob("*") if path.is_file())
        if self.limits["disk"] and used + len(body) > self.limits["disk"]:
            raise OSError(errno.ENOSPC, "full")
        target = self.data / name
        target.write_bytes(body)
        if os.geteuid() == 0:
            os.chown(target, self.uid, self.uid)

    def _beat(self, name: str) -> None:
        while not self._ended.wait(0.1):
            with contextlib.suppress(OSError):
                self._write(name, f"{time.time()}\n".encode())
