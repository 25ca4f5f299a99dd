"""libvirt: export and import of data without a guest, and hostile disks."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, DeadlineExceeded, DispatcherError, ProviderError
from dispatcher.manager.files.manifest import differences, manifest
from dispatcher.plugin.model import Limits
from tests.support import ordinary

pytest.importorskip("libvirt", reason="libvirt-python is not installed")

from dispatcher_libvirt.disks import sandbox
from dispatcher_libvirt.disks.data import DataDisk
from dispatcher_libvirt.disks.sandbox import Bind
from tests.support import vm
from tests.support.vm_world import World, quiet

pytestmark = [pytest.mark.libvirt, pytest.mark.root, pytest.mark.bubblewrap]


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def agent(world):
    """An agent that never ran, and its handle."""
    options = {"kernel": "/k", "data_size": "64M"}
    spec = world.spec("alice", **options)
    return spec, world.handles["alice"]


def fill(top, uid):
    """Make a tree with every kind of file, owned by one user."""
    (top / "deep" / "er").mkdir(parents=True)
    (top / "deep" / "er" / "file").write_bytes(os.urandom(300_000))
    (top / "empty").write_bytes(b"")
    (top / "private").write_bytes(b"secret\n")
    (top / "private").chmod(0o000)
    (top / "closed").mkdir()
    (top / "closed" / "inside").write_bytes(b"x")
    (top / "closed").chmod(0o000)
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o3775)
    (top / "setuid").write_bytes(b"#!/bin/sh\n")
    (top / "link").symlink_to("deep/er/file")
    (top / "dangling").symlink_to("/etc/shadow")
    (top / "long").symlink_to("z" * 3000)
    os.link(top / "private", top / "deep" / "same")
    os.mkfifo(top / "fifo")
    (top / "odd\n name é漢 '\"").write_bytes(b"odd\n")
    with (top / "sparse").open("wb") as file:
        file.seek(30 << 20)
        file.write(b"end")
    for path in (top, *top.rglob("*"), top / "closed" / "inside"):
        os.lchown(path, uid, uid)
    (top / "setuid").chmod(0o4750)
    os.utime(top / "deep" / "er" / "file", (1_000_000_000, 1_000_000_000))
    for number, name in enumerate(("empty", "setuid", "sticky", "link", "private")):
        seconds = (-1_000_000_000, 1_000_000_000, 2_147_483_647, 2_147_483_648, 4_102_444_800)[number]
        os.utime(top / name, ns=(0, seconds * 10**9 + 123_456_789), follow_symlinks=False)
    return top


def times(top):
    """Return the modification times of a tree, in nanoseconds."""
    return {path.relative_to(top): path.lstat().st_mtime_ns for path in top.rglob("*")}


def test_data_goes_in_and_out_whole(world, agent):
    spec, handle = agent
    source = fill(world.fresh_directory(), spec.uid)
    world.provider.import_data(handle, source, deadline=Deadline(60), progress=quiet)
    disk = world.machines / handle.name / "data.raw"
    assert (disk.stat().st_size, disk.stat().st_uid, disk.stat().st_mode & 0o777) == (64 << 20, spec.uid, 0o600)
    assert disk.stat().st_blocks * 512 < 16 << 20
    out = world.export(handle)
    assert differences(manifest(source), manifest(out)) == []
    assert times(out) == times(source)
    assert stat.S_IMODE((out / "setuid").stat().st_mode) == 0o4750
    assert (out / "sparse").stat().st_blocks * 512 < 1 << 20
    assert out.stat().st_uid == spec.uid
    # Once more, from what came out: the old disk's content is gone, its size stays.
    (out / "new").write_bytes(b"new\n")
    world.provider.import_data(handle, out, deadline=Deadline(60), progress=quiet)
    again = world.export(handle)
    assert (again / "new").read_bytes() == b"new\n"
    world.provider.destroy(handle, data=False, deadline=Deadline(20), progress=quiet)
    assert disk.exists(), "the old copy is kept until purged"
    world.provider.destroy(handle, data=True, deadline=Deadline(20), progress=quiet)
    assert not disk.parent.exists()


def test_a_tree_of_a_thousand_levels_goes_in_and_out_and_a_deeper_one_is_refused(world, agent):
    _, handle = agent
    source = world.fresh_directory()
    script = "import os\nfor _ in range({}):\n    os.mkdir('d'); os.chdir('d')\nopen('end', 'w').write('x')\n"
    subprocess.run([sys.executable, "-c", script.format(990)], cwd=source, check=True)
    world.provider.import_data(handle, source, deadline=Deadline(60), progress=quiet)
    out = world.fresh_directory()
    world.provider.export_data(handle, out, deadline=Deadline(60), progress=quiet)
    find = ["find", ".", "-name", "end", "-printf", "%d %s"]
    assert subprocess.run(find, cwd=out, capture_output=True, text=True).stdout == "991 1"
    deeper = world.fresh_directory()
    subprocess.run([sys.executable, "-c", script.format(3000)], cwd=deeper, check=True)
    with pytest.raises(ProviderError, match="is 6004 characters long") as caught:
        world.provider.import_data(handle, deeper, deadline=Deadline(60), progress=quiet)
    assert "deepest" in caught.value.fix
    for top in (source, out, deeper):
        subprocess.run(["rm", "-rf", top], check=True)


def test_an_immutable_disk_is_named_and_goes_when_it_may(world, agent):
    _, handle = agent
    world.provider.import_data(handle, world.fresh_directory(), deadline=Deadline(60), progress=quiet)
    disk = world.machines / handle.name / "data.raw"
    if subprocess.run(["chattr", "+i", disk], capture_output=True).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        with pytest.raises(ProviderError, match="data.raw") as caught:
            world.provider.destroy(handle, data=True, deadline=Deadline(20), progress=quiet)
        assert "chattr" in caught.value.fix
    finally:
        subprocess.run(["chattr", "-i", disk], check=True)
    world.provider.destroy(handle, data=True, deadline=Deadline(20), progress=quiet)
    assert not disk.parent.exists()


def test_many_small_files_fit(world, agent):
    spec, handle = agent
    source = world.fresh_directory()
    for number in range(9_000):  # a disk of that size has inodes for 8,192 by itself
        folder = source / f"d{number % 90}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{number}").write_bytes(b"")
    world.provider.import_data(handle, source, deadline=Deadline(60), progress=quiet)
    assert sum(len(files) for _, _, files in os.walk(world.export(handle))) == 9_000


def test_data_that_does_not_fit_is_an_error_and_the_old_data_stays(world, agent):
    spec, handle = agent
    good = world.fresh_directory()
    (good / "kept").write_bytes(b"kept\n")
    world.provider.import_data(handle, good, deadline=Deadline(60), progress=quiet)
    large = world.fresh_directory()
    (large / "large").write_bytes(os.urandom(70 << 20))
    with pytest.raises(ProviderError, match="does not fit") as caught:
        world.provider.import_data(handle, large, deadline=Deadline(60), progress=quiet)
    assert "disk limit" in caught.value.fix
    (large / "large").write_bytes(os.urandom(63 << 20))  # less than the disk, more than its file system holds
    with pytest.raises(ProviderError, match="does not fit"):
        world.provider.import_data(handle, large, deadline=Deadline(60), progress=quiet)
    assert (world.export(handle) / "kept").read_bytes() == b"kept\n"
    assert sorted(os.listdir(world.machines / handle.name)) == ["data.raw"]


def test_a_disk_grows_without_loss_and_never_shrinks(world, agent):
    spec, handle = agent
    source = fill(world.fresh_directory(), spec.uid)
    world.provider.import_data(handle, source, deadline=Deadline(60), progress=quiet)
    disk = DataDisk(world.machines / handle.name / "data.raw", (spec.uid, spec.gid), Deadline(180), lambda: None)
    for size, full in ((128 << 20, False), (160 << 20, True), (16 << 20, False)):
        disk.grow(size, full=full)
        assert differences(manifest(source), manifest(world.export(handle))) == []
    path = disk.path
    assert path.stat().st_size == 160 << 20
    assert path.stat().st_blocks * 512 > 30 << 20, "full allocation takes its space"
    larger = world.spec("alice", kernel="/k", limits=Limits(disk=300 << 20))
    world.provider.import_data(world.provider.handle(larger), source, deadline=Deadline(60), progress=quiet)
    assert path.stat().st_size == 300 << 20


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_cancelled_transfer_leaves_the_old_disk_and_nothing_else(world, agent, call):
    spec, handle = agent
    good = world.fresh_directory()
    (good / "kept").write_bytes(b"kept\n")
    world.provider.import_data(handle, good, deadline=Deadline(60), progress=quiet)
    calls = []

    def cancel(step, detail="", fraction=None):
        calls.append(step)
        if len(calls) >= call:
            raise Cancelled("no longer wanted")

    source = fill(world.fresh_directory(), spec.uid)
    with pytest.raises(Cancelled):
        world.provider.import_data(handle, source, deadline=Deadline(60), progress=cancel)
    assert sorted(os.listdir(world.machines / handle.name)) == ["data.raw"]
    calls.clear()
    try:
        world.provider.export_data(handle, world.fresh_directory(), deadline=Deadline(60), progress=cancel)
    except Cancelled:
        pass
    assert (world.export(handle) / "kept").read_bytes() == b"kept\n"


def test_a_journal_is_replayed_before_the_export(world, agent):
    """A journal that was not replayed, as after a power cut."""
    spec, handle = agent
    source = fill(world.fresh_directory(), spec.uid)
    world.provider.import_data(handle, source, deadline=Deadline(60), progress=quiet)
    disk = world.machines / handle.name / "data.raw"
    script = world.root / "script"
    script.write_text("feature needs_recovery\n")
    subprocess.run([sandbox.tool("debugfs"), "-w", "-f", script, disk], check=True, capture_output=True)
    assert differences(manifest(source), manifest(world.export(handle))) == []


def test_hostile_disks_are_refused_or_read_and_reach_nothing(world, agent):
    """Random damage ends as an error or as files: without a time-out, and inside the directory."""
    spec, handle = agent
    source = fill(world.fresh_directory(), spec.uid)
    world.provider.import_data(handle, source, deadline=Deadline(60), progress=quiet)
    disk = world.machines / handle.name / "data.raw"
    original = disk.read_bytes()
    used = [at for at in range(0, len(original), 4096) if original[at : at + 4096].strip(b"\0")]
    rng = random.Random(4)
    outcomes = set()
    for _ in range(12):
        data = bytearray(original)
        for _ in range(rng.choice([1, 20, 400])):
            at = rng.choice(used[:60]) + rng.randrange(4096)
            data[at] = rng.randrange(256)
        disk.write_bytes(data)
        out = world.fresh_directory()
        try:
            world.provider.export_data(handle, out, deadline=Deadline(60), progress=quiet)
            outcomes.add("read")
        except DispatcherError as error:
            assert isinstance(error, ProviderError), error
            assert error.fix
            outcomes.add("refused")
        for folder, folders, files in os.walk(out):
            for name in folders + files:
                found = os.lstat(os.path.join(folder, name))
                assert found.st_uid == spec.uid
                assert not stat.S_ISBLK(found.st_mode)
                assert not stat.S_ISCHR(found.st_mode)
    assert "read" in outcomes
    disk.write_bytes(b"\xff" * (1 << 20))
    with pytest.raises(ProviderError, match="is damaged") as caught:
        world.export(handle)
    assert "restore a snapshot" in caught.value.fix
    assert not [name for name in os.listdir(world.machines) if name != handle.name]


def test_tools_see_nothing_of_the_host(world, agent):
    """A subverted e2fsck has no file, network, other process or privilege, and limited time."""
    spec, _ = agent
    user = (spec.uid, spec.gid)
    mine = world.fresh_directory() / "image"
    mine.write_bytes(bytes(4096))
    os.chown(mine, *user)

    def run(script, **named):
        return sandbox.run(
            ["/bin/sh", "-c", script],
            binds=[Bind(mine, "/image", writable=True)],
            user=user,
            deadline=Deadline(named.pop("seconds", 20)),
            **named,
        )

    assert run("id -u; id -g; id -G").output.split() == [str(spec.uid), str(spec.gid), str(spec.gid)]
    assert run(f"ls {world.root} /root /home /run /var /etc/shadow 2>/dev/null").output == ""
    assert "shadow" not in run("ls /etc").output
    assert run("ls /proc /sys 2>/dev/null").output == ""
    assert run("cat /dev/kmsg; mknod /tmp/x b 8 0; touch /usr/x; mount -t tmpfs x /tmp").code != 0
    assert run("echo x > /image && cat /image").output == "x\n"
    status = run('while read -r line; do echo "$line"; done < /dev/null; python3 -c 1 2>/dev/null; true')
    assert status.code == 0
    network = "import socket; socket.create_connection(('127.0.0.1', 22), 1)"
    argv, binds = sandbox.python("ext4.py")
    done = sandbox.run([argv[0], "-I", "-S", "-c", network], binds=binds, user=user, deadline=Deadline(20))
    assert "Error" in done.output
    capabilities = "print(open('/proc/self/status').read())"
    done = sandbox.run([argv[0], "-I", "-S", "-c", capabilities], binds=binds, user=user, deadline=Deadline(20))
    assert "No such file" in done.output, "there is no /proc"
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        run("while :; do :; done", seconds=1)
    assert time.monotonic() - began < 5
    assert run("head -c 200000000 /dev/zero > /image", file_size=1 << 20).code != 0
    assert mine.stat().st_size <= 1 << 20
    hog = "x = bytearray(3 << 30)"
    done = sandbox.run([argv[0], "-I", "-S", "-c", hog], binds=binds, user=user, deadline=Deadline(20))
    assert "MemoryError" in done.output


def test_tools_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(sandbox, "SEARCH", "/nonexistent")
    with pytest.raises(ProviderError, match="The program e2fsck is missing") as caught:
        sandbox.tool("e2fsck")
    assert "e2fsprogs" in caught.value.fix


def test_an_ordinary_user_reads_disks_in_a_user_namespace():
    """Without root the sandbox is a user namespace; the exported files belong to that user."""
    home = Path("/tmp") / f"vm-user-{os.getpid()}"
    home.mkdir()
    uid = 65_534
    script = home / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path[:0] = {[str(vm.ROOT), str(vm.ROOT / 'providers')]!r}\n"
        "from pathlib import Path\n"
        "from dispatcher.plugin.deadline import Deadline\n"
        "from dispatcher_libvirt.disks.data import DataDisk\n"
        "quiet = lambda *a, **k: None\n"
        f"home = Path({str(home)!r})\n"
        "disk = DataDisk(home / 'data.raw', None, Deadline(30), quiet)\n"
        "(home / 'in').mkdir(); (home / 'in' / 'file').write_bytes(b'x\\n'); (home / 'out').mkdir()\n"
        "disk.import_from(home / 'in', 32 << 20)\n"
        "disk.export_to(home / 'out', quiet)\n"
        "found = (home / 'out' / 'file').stat()\n"
        "assert found.st_uid == os.getuid(), found\n"
        "print((home / 'out' / 'file').read_text(), end='')\n"
    )
    os.chown(home, uid, uid)
    try:
        done = subprocess.run(
            ordinary.command(uid, home, sys.executable, str(script)), capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (0, "x\n"), done.stderr
    finally:
        shutil.rmtree(home)
