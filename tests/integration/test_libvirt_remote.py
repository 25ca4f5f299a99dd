"""libvirt on another host: disks in its pool, agents through ssh.  The other host is this one, behind an sshd of the test's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError, Unavailable
from dispatcher.manager.files.manifest import differences, manifest
from dispatcher.plugin.model import BackendState, Capability, Depth, Limits
from dispatcher.testing.probe_client import Inside

pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from dispatcher_libvirt import network
from tests.support import vm
from tests.support.vm_world import World, quiet

pytestmark = [pytest.mark.libvirt, pytest.mark.root, pytest.mark.slow]


class Host:
    """The other host: an sshd on the loopback interface, and storage pools."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="host-"))
        self.directory.chmod(0o711)
        self.pool = f"disks-{os.getpid()}"
        self.images = f"images-{os.getpid()}"
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.directory / name], check=True
            )
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        (self.directory / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.directory}/host\n"
            f"AuthorizedKeysFile {self.directory}/user.pub\nPidFile none\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\n"
        )
        (self.directory / "ssh").write_text(
            f"#!/bin/sh\nexec ssh -o UserKnownHostsFile={self.directory}/known -o StrictHostKeyChecking=no "
            f'-i {self.directory}/user -o IdentitiesOnly=yes "$@"\n'
        )
        (self.directory / "ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        self.sshd: subprocess.Popen[bytes] | None = None
        self.up()
        (self.directory / "pool").mkdir(mode=0o711)
        for name, target in ((self.pool, self.directory / "pool"), (self.images, vm.images())):
            vm.virsh("pool-create-as", name, "dir", "--target", str(target))

    @property
    def uri(self) -> str:
        return f"qemu+ssh://root@127.0.0.1:{self.port}/system?command={self.directory}/ssh"

    def up(self) -> None:
        command = ["/usr/sbin/sshd", "-D", "-E", self.directory / "log", "-f", self.directory / "sshd_config"]
        self.sshd = subprocess.Popen(command)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError((self.directory / "log").read_text())

    def down(self) -> None:
        """Stop listening, and end every connection."""
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.sshd.pid)], capture_output=True, text=True
        ).stdout.split()
        self.sshd.kill()
        self.sshd.wait()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        self.down()
        for name in (self.pool, self.images):
            vm.virsh("pool-destroy", name)
        shutil.rmtree(self.directory)


@pytest.fixture(scope="module")
def host():
    host = Host()
    yield host
    host.close()


@pytest.fixture
def world(host):
    with World(uri=host.uri, pool=host.pool) as world:
        yield world
        left = list((host.directory / "pool").iterdir())
    assert not [path for path in (host.directory / "pool").iterdir()], left


def processes(needle):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if needle.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_machine_on_another_host_is_used_as_one_of_this(world, host):
    """Disks made there, reached through a socket here; asleep, awake, adopted, grown, moved and gone."""
    provider = world.provider
    provider.check(deadline=Deadline(30))
    assert Capability.LOGS not in provider.capabilities
    inside = world.probe("alice")
    handle, spec = world.handles["alice"], world.specs["alice"]
    assert inside.endpoint.kind == "unix"
    socket_path = Path(inside.endpoint.path)
    assert socket_path == spec.socket
    assert (socket_path.stat().st_uid, socket_path.stat().st_mode & 0o777) == (0, 0o660)
    assert "data-1.raw" in " ".join(path.name for path in (host.directory / "pool").iterdir())
    inside.write("/data/kept", b"kept\n")
    start = inside.id()["start"]
    inside.post("/count")

    fresh = world.another()  # a manager that was restarted finds the way, which never went away
    ((found, seen),) = fresh.list(deadline=Deadline(30))
    assert (found, seen.state, seen.endpoint) == (handle, BackendState.RUNNING, inside.endpoint)
    assert Inside(seen.endpoint, seen.owner_uid, timeout=20).id()["start"] == start
    fresh.close()

    provider.suspend(handle, depth=Depth.DISK, deadline=Deadline(90), progress=quiet)
    assert world.state(handle) is BackendState.HIBERNATED
    provider.resume(handle, deadline=Deadline(90), progress=quiet)
    assert world.inside(handle).get("/count") == b"1\n"

    provider.stop(handle, grace=20, deadline=Deadline(90), progress=quiet)
    assert not socket_path.exists()
    out = world.export(handle)
    assert (out / "kept").read_bytes() == b"kept\n"
    assert (out / "kept").stat().st_uid == spec.uid
    (out / "more").write_bytes(os.urandom(1 << 20))
    os.chown(out / "more", spec.uid, spec.gid)
    larger = world.spec("alice", limits=Limits(disk=80 << 20), **vm.app_options())
    provider.import_data(provider.handle(larger), out, deadline=Deadline(90), progress=quiet)
    assert differences(manifest(out), manifest(world.export(handle))) == []
    assert not list((world.root / "scratch").iterdir()), "copies of disks are gone"
    again = world.ensure(world.spec("alice", limits=Limits(disk=100 << 20), **vm.app_options()))
    inside = world.inside(again)
    assert inside.read("/data/kept") == b"kept\n"
    assert "data-3.raw" in " ".join(path.name for path in (host.directory / "pool").iterdir()), "it grew, whole"
    provider.destroy(handle, data=True, deadline=Deadline(60), progress=quiet)
    assert not processes(str(world.root / "run" / "ssh")), "the last agent takes the connection with it"


def test_an_unreachable_host_is_unavailable_and_comes_back(world, host):
    inside = world.probe("bob")
    handle, start = world.handles["bob"], inside.id()["start"]
    # The way alone breaks, just after it was looked at: the next observation makes it anew.
    for pid in processes(str(world.root / "run" / "ssh")):
        os.kill(pid, signal.SIGKILL)
    seen = world.observe(handle)
    assert Inside(seen.endpoint, seen.owner_uid, timeout=20).id()["start"] == start
    host.down()
    try:
        with pytest.raises(Unavailable, match="The host 127.0.0.1 cannot be reached|did not answer") as caught:
            world.observe(handle)
        assert caught.value.fix
    finally:
        host.up()
    end = time.monotonic() + 60
    while True:
        try:
            seen = world.observe(handle)
            break
        except Unavailable:
            assert time.monotonic() < end
            time.sleep(0.5)
    assert seen.state is BackendState.RUNNING
    assert Inside(seen.endpoint, seen.owner_uid, timeout=20).id()["start"] == start


def test_missing_files_on_the_other_host_are_reported(world, host):
    for key in ("image", "kernel", "initrd"):
        spec = world.spec("carol", **vm.app_options(**{key: f"/nonexistent/{key}"}))
        with pytest.raises(ProviderError, match="no storage pool of the other host contains it") as caught:
            world.ensure(spec)
        assert "pool-refresh" in caught.value.fix
    world.restart_provider(pool="no-such-pool")
    with pytest.raises(ProviderError, match="no storage pool no-such-pool"):
        world.ensure(world.spec("carol", **vm.app_options()))
    world.restart_provider(pool=host.pool)


def test_uris_become_arguments_of_ssh():
    uri = "qemu+ssh://admin@vm.example.org:2222/system?keyfile=/k&known_hosts=/h&no_verify=1"
    assert network.ssh_arguments(uri) == (
        "ssh",
        ["-p", "2222", "-l", "admin", "-i", "/k", "-o", "UserKnownHostsFile=/h", "-o", "StrictHostKeyChecking=no"],
        "vm.example.org",
    )
    assert network.ssh_arguments("qemu+ssh://h/system?command=/opt/ssh") == ("/opt/ssh", [], "h")
