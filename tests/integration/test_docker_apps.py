"""What apps with habits of their own find in a container: a user, a shell, room, devices, shared files, reasons."""

import os
import secrets
import stat
import subprocess
import time

import pytest

from dispatcher.plugin import BackendState, Deadline, Network, ProviderError
from dispatcher.plugin.model import Limits
from dispatcher.testing.probe_client import Refused
from tests.support.docker_tools import PORTED, DockerWorld, docker, inspect, leftovers

pytestmark = [pytest.mark.docker, pytest.mark.root]


@pytest.fixture
def world(docker_world):
    return docker_world


def run_in(agent, code):
    return docker("exec", agent.handle.name, "python3", "-c", code)


def eventually(check, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("name", ["alice", "root"])
def test_a_terminal_finds_its_user_and_a_shell(world, name):
    agent = world.run(name)
    environment = agent.inside.environment()
    shown = "alice" if name == "alice" else "agent"  # the image has a root of its own
    assert (environment["USER"], environment["LOGNAME"]) == (shown, shown)
    code = "import pwd, grp, os; u = pwd.getpwuid(os.getuid()); print(u.pw_name, u.pw_dir, u.pw_shell, grp.getgrgid(os.getgid()).gr_name); print(pwd.getpwnam('root').pw_uid)"
    user, root = run_in(agent, code).splitlines()
    assert user == f"{shown} /data {environment['SHELL']} {shown}"
    assert root == "0", "the image's own users stay"
    assert docker("exec", agent.handle.name, environment["SHELL"], "-c", "echo works") == "works"
    with pytest.raises(Refused):
        agent.inside.write("/etc/passwd", b"root::0:0::/:/bin/sh")


def test_temporary_files_larger_than_tmp_fit_and_go_with_the_next_start(world):
    agent = world.run("packer")
    assert agent.inside.environment()["TMPDIR"] == "/data/.tmp"
    code = "import tempfile, os; f = tempfile.NamedTemporaryFile(delete=False); os.posix_fallocate(f.fileno(), 0, 300 << 20); print(f.name)"
    assert run_in(agent, code).startswith("/data/.tmp/")
    with pytest.raises(AssertionError, match="No space left"):
        run_in(agent, "import os; f = open('/tmp/x', 'wb'); os.posix_fallocate(f.fileno(), 0, 300 << 20)")
    deep = "import os\nos.chdir('/data/.tmp')\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')"
    run_in(agent, deep)
    world.driver.stop(agent.handle)
    world.run("packer")
    assert os.listdir(agent.spec.data_dir / ".tmp") == []


def test_a_temporary_directory_that_is_a_link_leads_nowhere(world, tmp_path):
    (tmp_path / "precious").write_text("x")
    tmp_path.chmod(0o777)
    agent = world.run("linker")
    world.driver.stop(agent.handle)
    os.rmdir(agent.spec.data_dir / ".tmp")
    os.symlink(tmp_path, agent.spec.data_dir / ".tmp")
    world.run("linker")
    assert os.listdir(tmp_path) == ["precious"]


def test_a_device_comes_with_its_group(world):
    device = f"/dev/kit-{secrets.token_hex(4)}"
    os.mknod(device, 0o660 | stat.S_IFCHR, os.makedev(1, 7))  # /dev/full
    try:
        os.chown(device, 0, 4242)
        os.chmod(device, 0o660)
        agent = world.run("painter", options={"devices": [device]})
        assert run_in(agent, f"print(len(open('{device}', 'rb').read(3)))") == "3"
        assert "4242" in run_in(agent, "import os; print(os.getgroups())")
    finally:
        os.unlink(device)


def test_people_share_a_directory_by_its_group(world, tmp_path):
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    shared = tmp_path / "team"
    shared.mkdir()
    os.chown(shared, 0, 4243)
    shared.chmod(0o2770)
    options = {"mounts": [{"source": str(shared), "target": "/team", "read_only": False}]}
    alice, bob = world.run("alice", options=options), world.run("bob", options=options)
    run_in(alice, "import os; os.umask(0o007); open('/team/note', 'w').write('alice ')")
    run_in(bob, "open('/team/note', 'a').write('bob')")
    assert (shared / "note").read_text() == "alice bob"
    with pytest.raises(Refused):
        world.run("carol").inside.write("/team/x", b"x")


def test_a_child_killed_for_memory_is_counted_and_reported(world):
    agent = world.run("hungry", limits=Limits(memory=64 << 20, swap=0))
    assert world.observe(agent).oom_kills == 0
    changed = []
    watch = world.driver.provider.watch(changed.append)
    try:
        done = subprocess.run(
            ["docker", "exec", agent.handle.name, "python3", "-c", "x = bytearray(300 << 20)"], capture_output=True
        )
        assert done.returncode == 137
        assert eventually(lambda: agent.handle.name in changed)
    finally:
        watch.close()
    seen = world.observe(agent)
    assert (seen.state, seen.oom_kills) == (BackendState.RUNNING, 1)


def test_only_limits_that_the_engine_enforces_are_told(world, monkeypatch):
    world.driver.check()
    monkeypatch.setitem(world.driver.provider._info, "PidsLimit", False)  # an engine without that controller
    limits = Limits(memory=256 << 20, pids=4096, defaults=frozenset({"memory", "pids"}))
    agent = world.run("limited", limits=limits)
    told = {name for name in agent.inside.environment() if name.endswith("_LIMIT")}
    assert told == {"DISPATCHER_MEMORY_LIMIT"}
    made = inspect(agent.handle.name)["HostConfig"]
    assert (made["Memory"], made["PidsLimit"]) == (256 << 20, None)
    world.driver.ensure(agent.spec)  # the same specification


def test_an_app_that_listens_elsewhere_is_found(world):
    options = {**PORTED, "command": ["python3", "/probe.py", "--tcp", "127.0.0.1:8080"]}
    spec = world.make("loopback", options=options, network=Network.PRIVATE)
    handle = world.driver.ensure(spec)
    find = lambda: world.driver.provider.listeners(handle, deadline=Deadline(10))
    assert eventually(lambda: list(find()) == ["tcp:127.0.0.1:8080"])
    world.driver.destroy(handle)


def test_an_image_with_an_init_of_its_own_is_told_how_to_start(world):
    words = "s6-overlay-suexec: fatal: can only run as pid 1"
    command = ["sh", "-c", f"[ $$ = 1 ] && exec python3 /probe.py --unix {{socket}}; echo '{words}' >&2; exit 100"]
    spec = world.make("s6", options={"command": command})
    handle = world.driver.ensure(spec)
    assert eventually(lambda: world.driver.observe(handle).state is BackendState.STOPPED)
    seen = world.driver.observe(handle)
    assert seen.exit_reason == "exit code 100"
    assert "init = false" in seen.detail
    world.driver.destroy(handle)
    world.run("s6", options={"command": command, "init": False})


def test_removal_of_a_volume_tells_the_truth():
    """A tree of 3,000 levels goes; an immutable file stays, and the removal says so."""
    volumes = DockerWorld(data="volume")
    try:
        agent = volumes.run("deep")
        run_in(agent, "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')")
        volumes.driver.destroy(agent.handle, data=True)
        assert not leftovers(volumes.installation)
        agent = volumes.run("stuck")
        agent.inside.write("/data/kept", b"x")
        place = docker("volume", "inspect", "--format", "{{.Mountpoint}}", f"{agent.handle.name}-data")
        subprocess.run(["chattr", "+i", f"{place}/kept"], check=True)
        try:
            with pytest.raises(ProviderError, match="remove the data volume"):
                volumes.driver.destroy(agent.handle, data=True)
            assert os.path.exists(f"{place}/kept")
        finally:
            subprocess.run(["chattr", "-i", f"{place}/kept"], check=True)
        volumes.driver.destroy(agent.handle, data=True)
        assert not leftovers(volumes.installation)
    finally:
        volumes.close()
