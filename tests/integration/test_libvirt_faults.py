"""libvirt: faults of an app or its host are reported with a remedy, and leave no domain, disk or port."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import NotFound, ProviderError
from dispatcher.plugin.model import BackendState, Level, Limits
from dispatcher.testing.probe_client import Inside
from dispatcher.testing.kit import eventually
from tests.support import vm
from tests.support.vm_world import World, quiet

pytestmark = [pytest.mark.libvirt, pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def world():
    with World() as world:
        yield world


def ignore_errors(function, *arguments):
    """Call a function that may fail."""
    with contextlib.suppress(Exception):
        function(*arguments)


@contextlib.contextmanager
def small_disk(path, megabytes):
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=711", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_failed_starts_name_the_remedy_and_leave_nothing(world):
    """Disk full, no permission, name clash, a machine that QEMU refuses: one error each."""
    options = vm.app_options()
    images = vm.images()

    def fails(spec, why, fix=""):
        with pytest.raises(ProviderError) as caught:
            world.ensure(spec)
        assert why in str(caught.value), caught.value
        assert fix in caught.value.fix
        assert caught.value.fix
        assert vm.leftovers(world.installation, world.root, world.root / "full") == set()
        assert world.state(world.handles[spec.agent]) is BackendState.ABSENT

    secret = world.root / "closed"
    secret.mkdir(mode=0o700)
    (secret / "initrd").write_bytes((images / "probe.img").read_bytes())
    fails(world.spec("denied", **options | {"initrd": str(secret / "initrd")}), "may not read", "chmod o+x")
    secret.chmod(0o711)
    (secret / "initrd").chmod(0o600)
    fails(world.spec("denied", **options | {"initrd": str(secret / "initrd")}), "may not read", "chmod o+r")
    fails(world.spec("model", **options | {"cpu": "NoSuchProcessor"}), "NoSuchProcessor", "")
    fails(world.spec("machine", **options | {"machine": "no-such"}), "does not accept", "machine")
    extra = ["<watchdog model='no-such-watchdog' action='reset'/>"]
    fails(world.spec("extra", **options | {"xml": extra}), "does not accept", "xml")

    taken = world.spec("taken", **options)
    xml = f"<domain type='qemu'><name>{taken.backend_name}</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    (world.root / "taken.xml").write_text(xml)
    vm.virsh("define", str(world.root / "taken.xml"))
    try:
        with pytest.raises(ProviderError, match="exists already and is not the dispatcher's") as caught:
            world.ensure(taken)
        assert "virsh dumpxml" in caught.value.fix
        assert taken.agent not in [handle.agent for handle, _ in world.provider.list(deadline=Deadline(10))]
        world.provider.stop(world.handles["taken"], grace=1, deadline=Deadline(10), progress=quiet)
        world.provider.destroy(world.handles["taken"], data=True, deadline=Deadline(10), progress=quiet)
        assert taken.backend_name in vm.virsh("list", "--all", "--name"), "somebody else's machine is not touched"
    finally:
        vm.virsh("undefine", taken.backend_name)

    with small_disk(world.root / "full", 24) as place:
        world.restart_provider(storage=str(place / "machines"))
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        fails(world.spec("full", **options | {"data_allocation": "full"}), "The disk is full", "free some space")
        fails(world.spec("sparse", **options), "The disk is full", "free some space")


@contextlib.contextmanager
def file_system(path, megabytes):
    """A separate file system, mounted for libvirtd too, which may have its own mount namespace."""
    image = path.with_suffix(".img")
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", image], check=True)
    device = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    mounts = [[], ["nsenter", "-t", str(vm.libvirtd()), "-m"]]
    if os.readlink("/proc/self/ns/mnt") == os.readlink(f"/proc/{vm.libvirtd()}/ns/mnt"):
        mounts.pop()
    try:
        for there in mounts:
            subprocess.run([*there, "mount", device, path], check=True)
        path.chmod(0o711)
        yield path
    finally:
        for there in mounts:
            subprocess.run([*there, "umount", path], check=True)
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_full_host_stops_a_machine_with_the_reason_and_loses_nothing(world):
    with file_system(world.root / "small", 128) as place:
        filler = place / "filler"
        filler.write_bytes(bytes(80 << 20))
        world.restart_provider(storage=str(place / "machines"))
        try:
            inside = world.probe("alice")
            handle = world.handles["alice"]
            inside.write("/data/before", b"before\n")
            large = os.urandom(40 << 20)
            writer = threading.Thread(target=ignore_errors, args=(inside.write, "/data/large", large))
            writer.start()
            assert eventually(lambda: world.state(handle) is BackendState.SUSPENDED, 90)
            assert "the host's disk is full" in world.observe(handle).detail
            filler.unlink()
            world.provider.resume(handle, deadline=Deadline(30), progress=quiet)
            writer.join(60)
            assert world.inside(handle).read("/data/before") == b"before\n"
            assert world.state(handle) is BackendState.RUNNING
            world.provider.stop(handle, grace=20, deadline=Deadline(90), progress=quiet)
            out = world.export(handle)
            assert (out / "before").read_bytes() == b"before\n"
            assert large.startswith((out / "large").read_bytes()), "what was written is what was sent"
        finally:
            world.provider.destroy(world.handles["alice"], data=True, deadline=Deadline(60), progress=quiet)


def test_a_guest_that_never_listens_is_stopped_and_leaves_nothing(world):
    """The core waits for readiness; the provider shows the progress, and stops any guest."""
    options = vm.app_options() | {"command": ["/bin/busybox", "sleep", "1000"], "flush": "1s"}
    handle = world.ensure(world.spec("never", **options))
    assert eventually(lambda: "starting the app" in world.observe(handle).detail, 110, 0.1)
    assert eventually(lambda: world.observe(handle).endpoint, 10)
    assert not Inside(world.observe(handle).endpoint).answers()
    assert any(b"starting the app" in line for line in world.logs(handle))
    began = time.monotonic()
    world.provider.stop(handle, grace=0.3, deadline=Deadline(60), progress=quiet)
    assert time.monotonic() - began < 15
    world.provider.destroy(handle, data=True, deadline=Deadline(60), progress=quiet)
    assert vm.leftovers(world.installation, world.root) == set()


APP = """import os, socket, subprocess, sys, time
print("shell", os.environ["SHELL"], "user", os.environ["USER"], os.environ["LOGNAME"], flush=True)
print("tmp", os.environ["TMPDIR"], os.access(os.environ["TMPDIR"], os.W_OK), flush=True)
print("limits", os.environ["DISPATCHER_MEMORY_LIMIT"], os.environ["DISPATCHER_DISK_LIMIT"], flush=True)
try:
    print("vsock", socket.socket(socket.AF_VSOCK).connect((2, 22)), flush=True)
except OSError as error:
    print("vsock refused", flush=True)
code = subprocess.run([sys.executable, "-I", "-S", "-c", "x = [bytearray(1 << 20) for _ in range(500)]"]).returncode
print("child ended", code, flush=True)
wrong = socket.create_server(("127.0.0.1", 8888))
time.sleep(1000)
"""


def test_a_guest_tells_of_a_child_killed_for_memory_and_of_a_wrong_address(world):
    """Also what the app finds in its environment, and that a machine has no vsock device."""
    options = vm.app_options(
        command=["/usr/bin/python3.11", "-I", "-S", "-c", APP],
        cmdline="console=ttyS0 quiet panic=-1 cryptomgr.notests mitigations=off no_timer_check",
        flush="1s",
    )
    handle = world.ensure(world.spec("alice", limits=Limits(disk=64 << 20), **options))
    assert eventually(lambda: world.observe(handle).oom_kills == 1, 150, 0.5), world.logs(handle)[-20:]
    wanted = ["tcp:127.0.0.1:8888"]
    assert eventually(lambda: world.provider.listeners(handle, deadline=Deadline(5)) == wanted, 60, 0.5)
    said = b"\n".join(world.logs(handle)).decode()
    assert "shell /bin/sh user app app" in said
    assert "tmp /data/.tmp True" in said
    assert f"limits {160 << 20} {64 << 20}" in said
    assert "vsock refused" in said
    assert "child ended -9" in said
    assert world.state(handle) is BackendState.RUNNING


def test_the_check_reports_on_the_boot_files(world):
    good = world.spec("x", **vm.app_options())
    assert any("are present and valid" in one.what for one in world.provider.explain(good.app))
    bad = world.spec("x", **vm.app_options(initrd="/nonexistent"))
    (error,) = [one for one in world.provider.explain(bad.app) if one.level is Level.ERROR]
    assert "/nonexistent" in error.what
    assert error.fix


def test_export_of_nothing_is_not_found(world):
    handle = world.provider.handle(world.spec("nobody", **vm.app_options()))
    with pytest.raises(NotFound, match="no data disk"):
        world.provider.export_data(handle, world.fresh_directory(), deadline=Deadline(10), progress=quiet)
