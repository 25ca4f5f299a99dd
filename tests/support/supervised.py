"""A supervisor on real sandboxed processes: its own process when a test wants to kill it, else in the test's.

    python -m tests.support.supervised DIRECTORY STEP     dies (kill -9 of itself) at STEP of an operation; "" never.

Commands come a line each on standard input: ``create NAME``, ``start NAME``, ...; answers go to standard output.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from dispatcher.config.host_users import host_accounts
from dispatcher.config.load import parse
from dispatcher.manager.storage import agents
from dispatcher.manager.storage.database import Database
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.config.layout import Paths
from dispatcher.manager.storage.rows import Desired
from dispatcher.config.plugins import Plugins

ROOT = Path(__file__).parent.parent.parent

#: Answers every request with its pid; /exit ends it, /say prints; EXIT=N ends it at once, DELAY=S starts late.
APP = """
import os, socket, sys, time
print("begins", flush=True)
if "EXIT" in os.environ:
    print("cannot go on", flush=True)
    os._exit(int(os.environ["EXIT"]))
time.sleep(float(os.environ.get("DELAY", "0")))
s = socket.socket(socket.AF_UNIX)
try:
    os.unlink(sys.argv[1])
except OSError:
    pass
s.bind(sys.argv[1])
s.listen(64)
while True:
    c, _ = s.accept()
    request = c.recv(4096)
    if request.startswith(b"GET /exit"):
        os._exit(7)
    if request.startswith(b"GET /say"):
        print(request.split()[1].decode(), flush=True)
    body = str(os.getpid()).encode()
    c.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
    c.close()
"""


def python() -> str:
    """Return an interpreter that a sandbox can show: the system's where there is one, as it starts fast."""
    return shutil.which("python3", path="/usr/bin:/bin") or sys.executable


class Place:
    """Directories and configuration of one installation of real agents."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="ds", dir="/tmp"))
        self.directory.chmod(0o711)
        (self.directory / "state").mkdir(mode=0o711)
        self.app: dict[str, object] = {
            "provider": "subprocess",
            "stop_grace": 1,
            "start_timeout": 30,
            "subprocess": {"command": [python(), "-S", "-E", "-c", APP, "{socket}"]},
        }
        self.manager: dict[str, object] = {"reconcile_interval": 1}
        self.supervisors: list[Supervisor] = []

    def config(self):
        return parse(self.table())

    def table(self):
        return {
            "manager": {
                "state_dir": str(self.directory / "state"),
                "run_dir": str(self.directory / "run"),
                **self.manager,
            },
            "apps": {"demo": self.app},
        }

    def supervisor(self, start: bool = True) -> Supervisor:
        made = build(self.config())
        self.supervisors.append(made)
        if start:
            made.start()
        return made

    def process(self, step: str = "") -> Process:
        return Process(self, step)

    def end(self, supervisor: Supervisor) -> None:
        if supervisor in self.supervisors:
            self.supervisors.remove(supervisor)
            supervisor.close()
            supervisor.store.database.close()

    def close(self) -> None:
        """Remove every agent and everything else."""
        for supervisor in list(self.supervisors):
            self.end(supervisor)
        last = self.supervisor()
        for view in last.queries.views():
            last.commands.remove(view.name, keep_data=False)
        for view in last.queries.views():
            try:
                last.queries.wait(view.name, lambda view: view is None, 30)
            except Exception:
                continue
        self.end(last)
        shutil.rmtree(self.directory, ignore_errors=True)


def build(config) -> Supervisor:
    paths = Paths.of(config)
    paths.run_dir.mkdir(mode=0o755, exist_ok=True)
    database = Database(f"sqlite:///{paths.database}")
    database.open()
    return Supervisor(
        config=config,
        paths=paths,
        accounts=host_accounts(config),
        plugins=Plugins(),
        database=database,
        clock=agents.steady_clock(database),
    )


class Process:
    """A supervisor in a process of its own."""

    def __init__(self, place: Place, step: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.supervised", step],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.say(json.dumps(place.table()))

    def say(self, line: str) -> str:
        """Send a command; return the answer, "" when the process is dead."""
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def wait(self, seconds: float = 30) -> int:
        code = self._process.wait(seconds)
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        return code


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    step = sys.argv[1]
    supervisor = build(parse(json.loads(sys.stdin.readline())))

    def die(_agent, _kind, reached) -> None:
        if reached == step:
            os.kill(os.getpid(), signal.SIGKILL)

    supervisor.registry.on_step = die
    supervisor.start()
    print("started", flush=True)
    for line in sys.stdin:
        command, name, *rest = line.split()
        if command == "create":
            supervisor.commands.create(name, app=None, password_hash="hash")
        elif command == "remove":
            supervisor.commands.remove(name, keep_data=False)
        elif command == "restart":
            supervisor.commands.restart(name)
        elif command == "reset":
            supervisor.commands.reset_data(name)
        elif command == "wait":
            supervisor.queries.wait(name, lambda view: view is None or view.state.value == rest[0], 30)
        else:
            supervisor.commands.set_desired(name, Desired(command))
        print("done", flush=True)


if __name__ == "__main__":
    main()
