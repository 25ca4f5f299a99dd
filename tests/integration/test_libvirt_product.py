"""Virtual machines in the whole product: faults of an app are reported and leave nothing; libvirtd is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from dispatcher.plugin import names
from tests.support import vm
from tests.support.installation import Installation, until

pytestmark = [pytest.mark.libvirt, pytest.mark.root, pytest.mark.bubblewrap, pytest.mark.slow]

DEFAULTS = """
[defaults]
idle_timeout = false
max_restarts = 0
start_timeout = "4m"
stop_grace = "1s"
"""


def table(name: str, options: dict[str, object], **more: object) -> str:
    """Return the TOML of an app."""
    lines = [
        f"[apps.{name}]",
        'provider = "libvirt"',
        *(f"{key} = {json.dumps(value)}" for key, value in more.items()),
    ]
    lines += [f"[apps.{name}.libvirt]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    return "\n".join([*lines, ""]).replace("{", "{{").replace("}", "}}")


def broken_images(top: Path) -> dict[str, tuple[dict[str, object], str, str]]:
    """Return apps that cannot start: changed options, error, remedy."""
    top.chmod(0o755)
    base = vm.images() / "root.qcow2"
    cut, corrupt, text, overlay, closed = (top / name for name in ("cut", "corrupt", "text", "overlay", "closed"))
    data = base.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    corrupt.write_bytes(data[:48] + b"\xff" * 8 + data[56:])  # where the table of reference counts lies
    text.write_bytes(b"an image, honestly\n" * 1000)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay], check=True)
    shutil.copy(base, closed)
    for path in (cut, corrupt, text, overlay):
        path.chmod(0o644)
    closed.chmod(0o600)
    return {
        "missing": (
            {"image": f"{top}/none"},
            f"The image {top}/none cannot be used: No such file",
            "put it there",
        ),
        "initrd": (
            {"initrd": f"{top}/none"},
            f"The initrd {top}/none cannot be used: No such file",
            "put it there",
        ),
        "cut": ({"image": str(cut)}, "cut is damaged", "again"),
        "corrupt": ({"image": str(corrupt)}, "corrupt is damaged", "again"),
        "text": ({"image": str(text)}, "text is not a qcow2 image", 'format = "raw"'),
        "format": ({"image": str(base), "format": "raw"}, "root.qcow2 is a qcow2 image", 'format = "qcow2"'),
        "overlay": ({"image": str(overlay)}, "overlay is an overlay itself", "qemu-img convert"),
        "kernel": ({"kernel": str(text)}, "text is not a Linux kernel", "libvirt table"),
        "closed": ({"image": str(closed)}, "Machines may not read", "chmod o+r"),
    }


class Place(Installation):
    """An installation with every app of this module; alice's machine runs.

    :ivar id: what the installation calls itself; :ivar faults: as `broken_images`; :ivar cookie: alice's session.
    """

    def __init__(self, base: Path) -> None:
        options = vm.app_options()
        (base / "images").mkdir()
        self.faults = broken_images(base / "images")
        never = options | {"command": ["/bin/busybox", "sleep", "1000"], "flush": "1s"}
        apps = [
            DEFAULTS,
            table("good", options),
            table("clash", options),
            table("never", never, start_timeout="60s"),
        ]
        apps += [table(name, options | changes) for name, (changes, _, _) in self.faults.items()]
        super().__init__(base, "".join(apps), extra='default_app = "good"')

    def begin(self) -> None:
        self.start("manager")
        self.start("proxy")
        self.add("alice")
        self.cookie = self.login("alice")
        self.ask("/", 240)
        self.machine = self.admin("GET", "/agents/alice/runtime").json()["handle"]["name"]
        self.id = self.machine.split("-")[1]
        assert self.machine == names.backend_name(self.id, "alice")

    def ask(self, path: str, seconds: float = 20) -> str:
        """Return what alice's app answers through the proxy."""

        def answered() -> str | None:
            answer = self.web("GET", path, Cookie=self.cookie, Accept="*/*")
            return answer.body.decode() if answer.status == 200 else None

        return until(f"the app answers {path}", answered, seconds)

    def fails(self, agent: str, seconds: float = 60) -> dict:
        """Start an agent and return why it failed."""

        def failed() -> dict | None:
            row = self.admin("GET", f"/agents/{agent}").json()
            assert row["state"] != "running", row
            return row["failure"] if row["state"] == "failed" else None

        self.add(agent, agent)
        self.admin("PUT", f"/agents/{agent}/state", {"state": "running"})
        return until(f"{agent} fails", failed, seconds)

    def left(self) -> set[str]:
        """Return the remains of machines other than alice's."""
        found = vm.leftovers(self.id, self.base / "state/providers/libvirt")
        own = {f"process {pid}" for pid in vm.qemus(self.machine)}
        return {one for one in found if self.machine not in one} - own


@pytest.fixture(scope="module")
def site():
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    with Place(base) as site:
        site.begin()
        yield site


def test_faults_of_an_app_are_reported_and_leave_nothing(site):
    for name, (_, what, fix) in site.faults.items():
        found = site.fails(name)
        assert what in f"{found['what']}: {found['why']}", found
        assert fix in found["fix"], found
        assert site.left() == set()


def test_a_foreign_machine_is_not_touched(site, tmp_path):
    name = names.backend_name(site.id, "clash")
    xml = f"<domain type='qemu'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    (tmp_path / "clash.xml").write_text(xml)
    vm.virsh("define", str(tmp_path / "clash.xml"))
    try:
        found = site.fails("clash")
        assert f"A machine called {name} exists already and is not the dispatcher's" in found["what"]
        assert f"virsh dumpxml {name}" in found["fix"]
        assert site.left() == {f"domain {name}"}
    finally:
        vm.virsh("undefine", name)


def test_a_machine_whose_app_never_listens_fails_and_is_removed(site):
    found = site.fails("never", 150)
    assert found["what"] == "The app did not become ready in time"
    assert "start_timeout" in found["fix"]
    assert any("starting the app" in line for line in found["log"]), found
    # Its disk is its data and stays; neither a machine nor, with it, its port does.
    until("it is gone", lambda: all("never" not in one for one in site.left() if not one.startswith("file")))
    assert site.admin("DELETE", "/agents/never?wait=30").status in {200, 202, 204}
    until("nothing is left", lambda: site.left() == set())


@pytest.mark.libvirt_restart
def test_libvirtd_may_die_and_the_manager_too_while_machines_go_on(site):
    def state() -> str:
        return site.admin("GET", "/agents/alice").json()["state"]

    start, (qemu,) = site.ask("/id"), vm.qemus(site.machine)
    vm.kill_libvirtd()
    try:
        assert site.ask("/id") == start
        until("the manager notices", lambda: state() == "unknown")
        assert "libvirt" in " ".join(site.admin("GET", "/agents/alice/why").json()["sentences"])
        site.kill("manager")
        assert site.ask("/id") == start
        site.start("manager")
        assert site.ask("/id") == start
        assert state() in {"unknown", "running"}
    finally:
        vm.start_libvirtd()
    until("it is adopted", lambda: state() == "running", 60)
    assert (site.ask("/id"), vm.qemus(site.machine)) == (start, [qemu])
