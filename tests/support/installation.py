"""A whole installation in a directory of its own: the real manager and proxy as processes, real agents."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from dispatcher.common.tls import client_context

T = TypeVar("T")
PASSWORD = "correct horse battery"

#: A small app of one file: /pid, /env-like facts, /count (memory), /exit, WebSocket echo is left to the demo app.
APP = """
import http.server, json, os, socketserver, sys, threading
count = 0
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        global count
        path = self.path.partition("?")[0]
        if path == "/count":
            count += 1
        if path == "/exit":
            os._exit(3)
        if path == "/say":
            print("said", self.path, flush=True)
        body = json.dumps({"pid": os.getpid(), "count": count, "path": self.path,
                           "headers": [list(h) for h in self.headers.items()]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
    def address_string(self):
        return "proxy"
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128
    def get_request(self):
        connection, _ = super().get_request()
        return connection, ("proxy", 0)
os.umask(0o007)
Server(sys.argv[1], Handler).serve_forever()
"""


def until(what: str, check: Callable[[], T | None], seconds: float = 20.0) -> T:
    """Return the first true answer of `check`, or fail saying what never happened."""
    end = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < end:
        try:
            answer = check()
            if answer:
                return answer
            last = answer
        except OSError as error:
            last = error
        time.sleep(0.02)
    raise AssertionError(f"within {seconds:.0f} s never: {what} (last: {last!r})")


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.close()
            raise


class Answer:
    """One HTTP answer: status, headers (a message), body."""

    def __init__(self, reply: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = reply.status, reply.headers, reply.read()

    def json(self) -> Any:
        return json.loads(self.body)


def request(connection, method: str, path: str, body: object = None, **headers: str) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        fields.setdefault("Content-Type", "application/json")
    connection.request(method, path, data, fields)
    return Answer(connection.getresponse())


class Installation:
    """Write a configuration, start and kill its daemons, talk to both.

    :cvar scheme: of the proxy.

    :param base: a directory with a short path.  :param apps: TOML of the apps; `{app}` is the file of `APP`,
        `{python}` an interpreter.  :param extra: TOML put in front of it.  :param inside: what is put before the
        commands of the daemons.
    """

    scheme = "http"

    def __init__(
        self, base: Path, apps: str = "", extra: str = "", proxy: str = "", inside: Sequence[str] = ()
    ) -> None:
        self.base = base
        self.inside = inside
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        proxy = proxy.replace("{base}", str(base)).replace("{port}", str(self.port))
        app = base / "app.py"
        app.write_text(APP)
        app.chmod(0o644)
        apps = (
            apps or '[apps.web.subprocess]\ncommand = ["{python}", "{app}", "{{socket}}"]\nread_only = ["{app}"]\n'
        )
        self.config = base / "dispatcher.toml"
        self.config.write_text(
            f'{extra}\n[manager]\nstate_dir = "{base}/state"\nrun_dir = "{base}/run"\nreconcile_interval = "1s"\n'
            f'[proxy]\nlisten = ["127.0.0.1:{self.port}"]\n{proxy}\n' + apps.format(app=app, python=sys.executable)
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, what: str) -> subprocess.Popen[bytes]:
        """Start `manager` or `proxy` and wait until it answers; one that does not is ended."""
        with (self.base / f"{what}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.inside, sys.executable, "-m", "dispatcher", "--config", str(self.config), what],
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        self.processes[what] = process

        def answers() -> bool:
            if process.poll() is not None:
                text = (self.base / f"{what}.log").read_text(errors="replace")[-3000:]
                raise AssertionError(f"{what} ended with {process.returncode}:\n{text}")
            if what == "manager":
                return self.admin("GET", "/healthz").status == 200
            return self.web("GET", "/auth/login", Accept="text/html").status in {200, 303}

        try:
            until(f"the {what} answers", answers)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def kill(self, what: str) -> None:
        """`kill -9`, workers of the proxy included only in so far as they notice."""
        self.processes[what].kill()
        self.processes[what].wait()

    def admin(self, method: str, path: str, body: object = None) -> Answer:
        with closing(UnixConnection(self.base / "run/manager.sock")) as connection:
            return request(connection, method, path, body)

    def web(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        if self.scheme == "http":
            web = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        else:
            web = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=60, context=client_context(verify=False)
            )
        with closing(web) as connection:
            return request(connection, method, path, body, **headers)

    def add(self, name: str, app: str | None = None) -> None:
        answer = self.admin(
            "POST", "/agents", {"name": name, "password": PASSWORD, **({"app": app} if app else {})}
        )
        assert answer.status == 201, answer.body

    def login(self, name: str, password: str = PASSWORD) -> str:
        """Return the cookie header of a new session."""
        answer = self.web(
            "POST",
            "/auth/login",
            {"user": name, "password": password},
            Accept="application/json",
            Origin=f"{self.scheme}://127.0.0.1:{self.port}",
        )
        assert answer.status == 200, answer.body
        return "; ".join(value.split(";")[0] for value in answer.headers.get_all("Set-Cookie") or [])

    def app(self, cookie: str, path: str = "/", seconds: float = 20.0) -> Any:
        """Return the app's own answer, once it is up."""

        def answered() -> Any:
            answer = self.web("GET", path, Cookie=cookie)
            return answer.json() if answer.status == 200 else None

        return until(f"the app answers {path}", answered, seconds)

    def close(self) -> None:
        """Remove every agent, end both daemons, remove the directory."""
        try:
            manager = self.processes.get("manager")
            if manager is None or manager.poll() is not None:
                if not (self.base / "state/dispatcher.db").exists():
                    return  # no manager ever was, so there are no agents
                self.start("manager")
            for row in self.admin("GET", "/agents").json()["agents"]:
                self.admin("DELETE", f"/agents/{quote(row['name'])}?wait=30")
        finally:
            for process in self.processes.values():
                process.terminate()
            for process in self.processes.values():
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            shutil.rmtree(self.base, ignore_errors=True)
