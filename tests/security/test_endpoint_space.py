"""An agent writes all it can beside its socket: the host's memory file system, and the manager in it, go on."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from dispatcher.manager.files.socket_tmpfs import FILES, SIZE, SocketTmpfs
from dispatcher.plugin.model import Level
from tests.support.installation import Installation, UnixConnection, request, until

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap]

APP = """
import http.server, os, socketserver, sys
place = os.path.dirname(sys.argv[1])
def fill():
    files = size = 0
    try:
        with open(place + "/big", "wb") as file:
            while size < 1 << 28:
                size += file.write(bytes(1 << 16))
                file.flush()
    except OSError:
        pass
    try:
        while files < 100_000:
            os.close(os.open(f"{place}/{files}", os.O_CREAT | os.O_WRONLY))
            files += 1
    except OSError:
        pass
    return f"{size} {files}".encode()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = fill() if self.path == "/fill" else str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    def get_request(self):
        return super().get_request()[0], ("proxy", 0)
os.umask(0o007)
Server(sys.argv[1], Handler).serve_forever()
"""
ROOM = 3 * SIZE


def on_machine(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


PROBED = """
[apps.probe]
provider = "docker"
health = "/"
[apps.probe.docker]
image = "dispatcher-test/probe"
command = ["python3", "/probe.py", "--unix", "{{socket}}"]
"""


@pytest.fixture
def apps() -> str:
    return ""


@pytest.fixture
def site(short_tmp, apps):
    """An installation whose run directory is a tmpfs, as /run is."""
    run = short_tmp / "run"
    run.mkdir(mode=0o755)
    on_machine("mount", "-t", "tmpfs", "-o", f"mode=0755,size={ROOM}", "endpoint-test", str(run))
    on_machine("mount", "--make-shared", str(run))
    try:
        site = Installation(short_tmp, apps)
        (short_tmp / "app.py").write_text(APP)
        try:
            yield site
        finally:
            with contextlib.suppress(OSError, AssertionError):
                site.close()
    finally:
        on_machine("umount", "--lazy", "--recursive", str(run))  # the log collector ends a moment later


def endpoints(site: Installation) -> Path:
    return site.base / "run/a"


def reach(site: Installation, name: str, state: str) -> dict:
    answer = site.admin("PUT", f"/agents/{name}/state?wait=30", {"state": state})
    return answer.json()


def ask(site: Installation, name: str, path: str = "/") -> str:
    """Ask an agent over its own socket, as the proxy would."""
    endpoint = site.admin("GET", f"/agents/{name}/runtime").json()["endpoint"]
    with closing(UnixConnection(Path(endpoint.removeprefix("unix:")))) as connection:
        answer = request(connection, "GET", path)
    assert answer.status == 200
    return answer.body.decode()


def mounts(site: Installation) -> int:
    return Path("/proc/self/mountinfo").read_text().count(f" {endpoints(site)} ")


def findings(site: Installation) -> str:
    return json.dumps(site.admin("GET", "/providers/subprocess/check").json())


def test_what_an_agent_writes_beside_its_socket_fills_nothing_of_the_host(site) -> None:
    site.start("manager")
    for name in ("alice", "bob"):
        site.add(name)
    assert reach(site, "alice", "running")["state"] == "running"
    pid = ask(site, "alice")
    size, files = map(int, ask(site, "alice", "/fill").split())
    assert size <= SIZE and files <= FILES
    found = os.statvfs(site.base / "run")
    assert found.f_bavail * found.f_frsize >= ROOM - SIZE // 8, "the host's file system is as empty as before"
    (site.base / "run/other").write_bytes(bytes(1 << 20))
    assert "files" in findings(site)
    if "usrquota" in Path("/proc/self/mountinfo").read_text():
        assert reach(site, "bob", "running")["state"] == "running"
    else:
        told = json.dumps(reach(site, "bob", "running"))
        greedy = next(path for path in endpoints(site).iterdir() if (path / "big").exists())
        assert "no space" in told and str(greedy) in told and str(greedy.stat().st_uid) in told

    site.kill("manager")
    site.start("manager")
    assert ask(site, "alice") == pid, "adopted, through the same socket"
    assert mounts(site) == 1

    site.processes["manager"].terminate()
    site.processes["manager"].wait(20)
    assert mounts(site) == 1, "an agent lives in it"
    site.start("manager")
    assert ask(site, "alice") == pid
    site.admin("DELETE", "/agents/alice?wait=30")
    until("bob runs", lambda: reach(site, "bob", "running").get("state") == "running")
    site.admin("DELETE", "/agents/bob?wait=30")
    site.processes["manager"].terminate()
    site.processes["manager"].wait(20)
    assert mounts(site) == 0, "nobody needs it any more"
    assert not (site.base / "manager.log").read_text().count("Traceback")


def test_a_manager_in_a_mount_namespace_of_its_own_mounts_where_the_proxy_sees_it(site) -> None:
    """As a systemd unit with ProtectSystem= is."""
    command = [sys.executable, "-m", "dispatcher", "--config", str(site.config), "manager"]
    with (site.base / "manager.log").open("ab") as log:
        site.processes["manager"] = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "--", *command], stdout=log, stderr=log
        )
    until("the manager answers", lambda: site.admin("GET", "/healthz").status == 200)
    assert mounts(site) == 1
    site.add("alice")
    assert reach(site, "alice", "running")["state"] == "running"
    assert ask(site, "alice").isdigit()


def test_a_directory_with_endpoints_in_use_is_not_covered_up(site) -> None:
    endpoint = endpoints(site) / "0123456789abcdef"
    endpoint.mkdir(parents=True)
    space = SocketTmpfs(endpoints(site), privileged=True)
    space.open()
    assert endpoint.exists() and not endpoints(site).is_mount()
    assert space.finding().level is Level.WARNING and "the next boot" in space.finding().what


def test_an_ordinary_user_is_told_what_is_not_bounded(site) -> None:
    endpoints(site).mkdir()
    space = SocketTmpfs(endpoints(site), privileged=False)
    space.open()
    assert not endpoints(site).is_mount()
    assert "can fill" in space.finding().what and "root" in space.finding().fix
    space.close()


@pytest.mark.docker
@pytest.mark.parametrize("apps", [PROBED], ids=["probe"])
def test_a_container_fills_no_more(site) -> None:
    """The engine shows it a directory of the same small file system."""
    from tests.support.docker_tools import images

    images()
    site.start("manager")
    site.add("alice")
    assert reach(site, "alice", "running")["state"] == "running"
    endpoint = site.admin("GET", "/agents/alice/runtime").json()["endpoint"]
    path = Path(endpoint.removeprefix("unix:"))
    statuses = []
    for number in range(SIZE // (4 << 20) + 1):
        with closing(UnixConnection(path)) as connection:
            connection.request("POST", f"/write?path=/run/dispatcher/big{number}", bytes(4 << 20))
            with contextlib.suppress(OSError, http.client.HTTPException):
                statuses.append(connection.getresponse().status)
    assert statuses[0] == 200 and len(list(path.parent.glob("big*"))) > 1
    found = os.statvfs(site.base / "run")
    assert found.f_bavail * found.f_frsize >= ROOM - SIZE // 8
    assert sum(file.stat().st_blocks * 512 for file in path.parent.iterdir()) <= SIZE
