"""One configuration, three apps on three providers, one person with all of them; then an operator moves one.

The move goes from containers to virtual machines and back, in one line each.  Owners, modes, links and times of
every file are compared by a manifest of the test's own, and the old copies stay until they are purged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from dispatcher.plugin import names
from dispatcher.testing import PROBE
from tests.support.docker_tools import images as docker_images
from tests.support.installation import Installation, UnixConnection, request, until
from tests.support.vm import app_options

pytestmark = [
    pytest.mark.docker,
    pytest.mark.libvirt,
    pytest.mark.root,
    pytest.mark.bubblewrap,
    pytest.mark.slow,
    pytest.mark.xdist_group("machines"),
]

APPS = f"""
[defaults]
idle_timeout = false
start_timeout = "4m"
stop_grace = "5s"

[apps.process]
provider = "subprocess"
[apps.process.subprocess]
command = ["{sys.executable}", "{PROBE}", "--unix", "{{{{socket}}}}"]
read_only = ["{PROBE.parent}"]

[apps.container]
provider = "docker"
[apps.container.docker]
image = "dispatcher-test/probe"
command = ["python3", "/probe.py", "--unix", "{{{{socket}}}}"]
[apps.container.libvirt]
GUEST

[apps.machine]
provider = "libvirt"
memory = "192M"
disk = "64M"
[apps.machine.libvirt]
GUEST
"""
SECONDS = 240  # an emulated machine on a busy host


class Place:
    """An installation where alice has one agent with each provider, and her session."""

    def __init__(self, site: Installation) -> None:
        self.site = site
        site.add("alice", "process")
        for app in ("container", "machine"):
            answer = site.admin("POST", "/agents", {"name": "alice", "app": app})
            assert (answer.status, answer.headers["Location"]) == (201, f"/agents/alice%3A{app}"), answer.body
        self.cookie = site.login("alice")

    def select(self, agent: str) -> None:
        """Send the session to another app of the same person, as the dashboard's *Open* does."""
        token = re.search(r"dispatcher=([^;]+)", self.cookie)[1]
        body = {"sha256": hashlib.sha256(token.encode()).hexdigest(), "agent": agent}
        with closing(UnixConnection(self.site.base / "run/proxy.sock")) as connection:
            answer = request(connection, "POST", "/sessions/select", body)
        assert answer.status == 200, answer.body

    def ask(self, path: str) -> bytes:
        """Return the answer of the app that the session is at, through the proxy, once it is up."""

        def answered():
            answer = self.site.web("GET", path, Cookie=self.cookie, Accept="*/*")
            return answer.body if answer.status == 200 else None

        return until(f"the app answers {path}", answered, SECONDS)

    def path(self, name: str) -> str:
        """Return a file's path as the app sees it, ready for a query."""
        pairs = dict(entry.split("=", 1) for entry in self.ask("/env").decode().split("\0") if "=" in entry)
        return quote(f"{pairs['DISPATCHER_DATA']}/{name}")

    def write(self, name: str, text: str) -> None:
        origin = f"http://127.0.0.1:{self.site.port}"
        path = f"/write?path={self.path(name)}"
        answer = self.site.web("POST", path, text, Cookie=self.cookie, Origin=origin)
        assert answer.status == 200, answer.body

    def read(self, name: str) -> str:
        return json.loads(self.ask(f"/read?path={self.path(name)}"))

    def move(self, provider: str) -> None:
        """Name another provider in the one place, reload, and start the agent anew."""
        self.begin_move(provider)

        def moved() -> bool:
            row = self.site.admin("GET", "/agents/alice:container").json()
            assert row["state"] != "failed", row["failure"]
            return row["provider"] == provider and row["state"] == "running"

        until(f"it runs on {provider}", moved, SECONDS)

    def begin_move(self, provider: str) -> None:
        text = self.site.config.read_text()
        head, tail = text.split("[apps.container]\n", 1)
        tail = re.sub(r'provider = "\w+"', f'provider = "{provider}"', tail, count=1)
        self.site.config.write_text(f"{head}[apps.container]\n{tail}")
        answer = self.site.admin("POST", "/reload")
        assert answer.status == 200, answer.body
        answer = self.site.admin("POST", "/agents/alice:container/restart")
        assert answer.status in {200, 202}, answer.body

    def copies(self) -> list[dict]:
        return self.site.admin("GET", "/agents/alice:container/copies").json()["copies"]


@pytest.fixture(scope="module")
def site():
    docker_images()
    guest = "\n".join(f"{key} = {json.dumps(value)}" for key, value in app_options().items())
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    site = Installation(base, APPS.replace("GUEST", guest))
    site.config.write_text('default_app = "process"\n' + site.config.read_text())
    try:
        site.start("manager")
        site.start("proxy")
        yield site
    finally:
        site.close()


def fill(top: Path, uid: int) -> None:
    """Make what is easily lost on the way."""
    (top / "sub/deeper").mkdir(mode=0o750, parents=True)
    (top / "sub/deeper/run").write_text("#!/bin/sh\n")
    (top / "sub/deeper/run").chmod(0o6751)
    (top / "sub/hidden").write_bytes(b"nobody may read this\n")
    (top / "sub/hidden").chmod(0o000)
    (top / "shared").mkdir()
    (top / "shared").chmod(0o3775)
    (top / "closed").mkdir()
    (top / "closed/inside").write_bytes(b"x")
    (top / "closed").chmod(0o000)
    (top / "empty").write_bytes(b"")
    (top / "odd\n name é漢 '\"").write_bytes(b"odd\n")
    (top / "link").symlink_to("sub/deeper/run")
    (top / "away").symlink_to("/etc/shadow")
    (top / "long").symlink_to("z" * 3000)
    os.link(top / "sub/deeper/run", top / "shared/same")
    os.mkfifo(top / "pipe", 0o620)
    with (top / "sparse").open("wb") as file:
        file.seek(20 << 20)
        file.write(b"end")
    for path in (*top.rglob("*"), top / "closed/inside"):
        mode = path.lstat().st_mode
        os.lchown(path, uid, uid)
        if not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode))  # a change of owner takes setuid away
    os.utime(top / "sub/deeper/run", ns=(0, 1_000_000_000_123_456_789))
    os.utime(top / "empty", ns=(0, 4_102_444_800_000_000_000))  # after 2038
    os.utime(top / "link", ns=(0, 1_200_000_000_000_000_000), follow_symlinks=False)
    os.utime(top / "sub/deeper", ns=(0, 1_300_000_000_500_000_000))
    os.utime(top / "closed", ns=(0, 1_400_000_000_000_000_000))


def manifest(top: Path) -> dict[str, tuple]:
    """Every entry below `top`: kind and mode, owner and group, time in ns, links, target or content."""
    found: dict[str, tuple] = {}
    same: dict[int, list[str]] = {}
    for path in sorted(top.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(top))
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            same.setdefault(status.st_ino, []).append(name)
        mode = oct(status.st_mode)
        if name.split("/")[0] == ".tmp":  # emptied at each start
            continue
        found[name] = (mode, status.st_uid, status.st_gid, status.st_mtime_ns, same.get(status.st_ino), content)
    return found


def test_one_person_uses_three_providers_and_a_move_keeps_everything(site):
    place = Place(site)
    agents = ("alice:machine", "alice", "alice:container")
    for agent in agents:
        place.select(agent)
        assert place.ask("/") == b"probe\n"
        place.write("note", f"note of {agent}")
    for agent in agents:  # each has its own data, whatever keeps it
        place.select(agent)
        assert place.read("note") == f"note of {agent}"
    rows = {row["name"]: row["provider"] for row in site.admin("GET", "/agents").json()["agents"]}
    assert rows == {"alice": "subprocess", "alice:container": "docker", "alice:machine": "libvirt"}

    data = site.base / "state/agents" / names.key("alice:container") / "data"
    uid = site.admin("GET", "/agents/alice:container/runtime").json()["uid"]
    fill(data, uid)
    before = manifest(data)
    assert {entry[1] for entry in before.values()} == {uid}

    foreign = data / "sub/deeper/of root"
    foreign.write_bytes(b"#!/bin/sh\n")
    foreign.chmod(0o4755)
    place.begin_move("libvirt")
    failed = until("it fails", lambda: site.admin("GET", "/agents/alice:container").json()["failure"], SECONDS)
    assert f"sub/deeper/of root has another owner (0:0, then {uid}:{uid})" in failed["why"]
    assert "chown" in failed["fix"]
    foreign.unlink()
    os.utime(foreign.parent, ns=(0, before["sub/deeper"][3]))
    assert {name: entry for name, entry in manifest(data).items() if name != "saved"} == before

    place.move("libvirt")
    assert place.read("note") == "note of alice:container"
    (copy,) = place.copies()
    assert copy["provider"] == "docker"
    place.write("later", "written in the machine")

    place.move("docker")
    assert place.read("later") == "written in the machine"
    after = manifest(data)
    assert after.pop("later")[1:3] == (uid, uid)
    after.pop("saved")  # the probe writes it when it is told to end
    assert after == before
    assert (data / "sparse").stat().st_blocks * 512 < 1 << 20

    assert len(place.copies()) == 2, "what was before each move is kept"
    assert site.admin("DELETE", "/agents/alice:container/copies").status in {200, 204}
    assert place.copies() == []
    assert place.read("note") == "note of alice:container"


@pytest.mark.parametrize(
    ("provider", "app", "backend", "own"),
    [
        (
            "subprocess",
            "process",
            [
                "bubblewrap sandboxes: own mount, pid, ipc",
                "Of the host's files an agent sees /usr",
                "user id of its own",
            ],
            ["a Unix socket that only the proxy and the agent itself can reach", "reaches no network"],
        ),
        (
            "docker",
            "container",
            [
                "share the host's kernel: an exploit of the kernel escapes",
                "its own pid, mount, ipc and network namespaces",
            ],
            [
                "a Unix socket that only its own user and the proxy can reach",
                "has no network at all",
            ],
        ),
        (
            "libvirt",
            "machine",
            [
                "shares no kernel, memory, process or file with another agent",
                "open to every local user",
                "Machines",
            ],
            ["not to this host, the outside or other machines", "boots from are present and valid"],
        ),
    ],
)
def test_each_provider_says_what_it_keeps_apart_and_from_what(site, provider, app, backend, own):
    """On the command line, which gives a sentence for each thing, and what to do about the bad ones."""
    for arguments, wanted in (([provider], backend), ([provider, "--app", app], own)):
        command = [sys.executable, "-m", "dispatcher", "--config", site.config, "--json", "providers", "check"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=True)
        findings = json.loads(done.stdout)[provider]
        for words in wanted:
            assert any(words in finding["what"] for finding in findings), (words, findings)
        for finding in findings:
            assert finding["level"] in {"ok", "info", "warning", "error"}
            assert finding["level"] not in {"warning", "error"} or finding["fix"], finding
