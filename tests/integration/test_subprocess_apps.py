"""What apps expect of a machine: a shell, room for temporary files, devices, shared directories, words when they err."""

import os
import stat
import subprocess

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError
from dispatcher.plugin.model import BackendState, Capability, Limits, Network
from tests.support.subprocess_world import PYTHON, ROOT, World, eventually, lines, observe, stop

SHELL = [PYTHON, "-S", "-c"]
#: Runs a program with the socket's path in its arguments, then waits.
RUN = "import subprocess, sys, time; subprocess.run(['/bin/sh', '-c', sys.argv[2]]); time.sleep(60)"


@pytest.fixture
def world():
    made = World("7e570050")
    yield made
    made.close()


def told(world, script, agent="alice", **options):
    """Return what a shell script prints in an agent."""
    provider = world.provider()
    done = "touch $DISPATCHER_DATA/done"
    spec = world.spec(
        agent, [*SHELL, RUN, "{socket}", f"({script}) > $DISPATCHER_DATA/told 2>&1; {done}"], options=options
    )
    handle, _ = world.start(provider, spec, ready=False)
    eventually((spec.data_dir / "done").exists, 20)
    (spec.data_dir / "done").unlink()
    stop(provider, handle, grace=0)
    return (spec.data_dir / "told").read_text()


@pytest.mark.bubblewrap
def test_a_terminal_finds_its_user_and_a_shell(world):
    lines = told(
        world, 'echo $USER $LOGNAME $SHELL; test -x "$SHELL" && echo runs; getent passwd $(id -u)'
    ).splitlines()
    assert lines[:2] == ["alice alice /bin/bash", "runs"]
    if ROOT:
        name, _, uid, gid, _, home, shell = lines[2].split(":")
        assert (name, int(uid), home, shell) == ("alice", world.uid("alice"), "/data", "/bin/bash")


@pytest.mark.bubblewrap
def test_temporary_files_larger_than_tmp_fit_and_go_with_the_next_start(world):
    program = "dd if=/dev/zero of=$(mktemp) bs=1M count=40 status=none && ls $TMPDIR | wc -l"
    for _ in range(2):
        assert told(world, program, tmp_size="4M") == "1\n", "the one of the earlier start is gone"


@pytest.mark.bubblewrap
def test_a_temporary_directory_that_is_a_link_leads_nowhere(world):
    spec = world.spec("alice")
    target = world.base / "target"
    target.mkdir()
    (target / "precious").write_text("precious")
    (spec.data_dir / ".tmp").symlink_to(target)
    assert told(world, "echo up") == "up\n"
    assert (target / "precious").read_text() == "precious"


@pytest.mark.parametrize("where", ["run", pytest.param("tmp", marks=pytest.mark.bubblewrap)])
def test_a_tree_of_three_thousand_levels_is_removed(world, where):
    provider = world.provider()
    spec = world.spec("alice")
    parent = spec.run_dir
    if where == "tmp":
        parent = spec.data_dir / ".tmp"
        parent.mkdir()
        os.chown(parent, spec.uid, spec.gid)
    subprocess.run(
        [PYTHON, "-S", "-c", "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')"],
        cwd=parent,
        check=True,
        **({"user": spec.uid, "group": spec.gid} if ROOT and where == "tmp" else {}),
    )
    _, inside = world.start(provider, spec)
    assert inside.answers()
    assert not (parent / "d").exists()


@pytest.mark.root
@pytest.mark.bubblewrap
def test_a_device_comes_with_its_group_and_its_directory_in_sys(world):
    device = world.base / "dev/dri"
    device.mkdir(parents=True)
    number = os.stat("/dev/null").st_rdev
    os.mknod(device / "renderD128", 0o660 | stat.S_IFCHR, number)
    os.chown(device / "renderD128", 0, 44)
    os.chmod(device / "renderD128", 0o660)
    script = f"id -G; echo x > {device}/renderD128 && echo writable; cat /sys/dev/char/1:3/uevent; ls /sys"
    found = told(world, script, devices=[str(device)]).splitlines()
    assert found[0].split() == [str(world.uid("alice")), "44"]
    assert "writable" in found and "DEVNAME=null" in found
    assert found[-2:] == ["dev", "devices"], "nothing else of /sys"


@pytest.mark.root
@pytest.mark.bubblewrap
def test_people_share_a_directory_by_its_group(world):
    shared, private = world.base / "team", world.base / "owned"
    for path, gid, mode in ((shared, 4242, 0o2770), (private, 0, 0o2770)):
        path.mkdir()
        os.chown(path, 0, gid)
        path.chmod(mode)
    options = {"writable": [str(shared), str(private)]}
    assert told(world, f"echo hello > {shared}/note; id -G", "alice", **options).split()[-1] == "4242"
    assert told(world, f"cat {shared}/note; echo from bob >> {shared}/note", "bob", **options) == "hello\n"
    assert told(world, f"cat {shared}/note", "alice", **options) == "hello\nfrom bob\n"
    assert "denied" in told(world, f"ls {private}", "alice", **options), "root's group is nobody's"
    assert "No such file" in told(world, f"cat {shared}/note", "carol"), "an app that does not name it"


@pytest.mark.bubblewrap
@pytest.mark.parametrize("key", ["writable", "devices"])
def test_a_path_that_has_vanished_is_named(world, key):
    """bubblewrap takes a while until it reports that, as it looks for many other paths first."""
    provider = world.provider()
    missing = str(world.base / "missing")
    deep = world.base.joinpath(*["d"] * 60)
    deep.mkdir(parents=True)
    many = [deep / str(number) for number in range(300)]
    for path in many:
        path.touch()
    options = {"writable": list(map(str, many))}
    options[key] = [*options.get(key, ()), missing]
    with pytest.raises(ProviderError, match=missing):
        world.start(provider, world.spec("alice", options=options), ready=False)


def test_where_an_app_listens_is_known(world):
    program = (
        "import os, socket, sys, time\n"
        "tcp = socket.create_server(('0.0.0.0', 0))\n"
        "six = socket.create_server(('::1', 0), family=socket.AF_INET6)\n"
        "unix = socket.socket(socket.AF_UNIX)\n"
        "unix.bind(os.environ['DISPATCHER_DATA'] + '/my socket')\n"
        "unix.listen()\n"
        "print(tcp.getsockname()[1], six.getsockname()[1], flush=True)\n"
        "time.sleep(60)\n"
    )
    provider = world.provider()
    spec = world.spec("alice", [PYTHON, "-S", "-c", program, "{socket}"], network=Network.HOST)
    handle, _ = world.start(provider, spec, ready=False)
    one, two = eventually(lambda: lines(provider, handle))[0].decode().split()
    found = provider.listeners(handle, deadline=Deadline(5))
    assert found[:2] == [f"tcp:0.0.0.0:{one}", f"tcp:[::1]:{two}"]
    assert found[2].startswith("unix:") and found[2].endswith("/my socket")
    stop(provider, handle, grace=0)
    assert list(provider.listeners(handle, deadline=Deadline(5))) == []


@pytest.mark.root
def test_a_child_that_is_killed_for_memory_is_counted(world):
    """The app itself lives on; only the group's counter tells."""
    provider = world.provider()
    if Capability.MEMORY_LIMIT not in provider.capabilities:
        pytest.fail("this machine limits no memory: run on one with a memory controller")
    program = "import os, time\nif not os.fork(): bytearray(1 << 28)\nos.wait()\ntime.sleep(60)"
    spec = world.spec("alice", [PYTHON, "-S", "-c", program, "{socket}"], limits=Limits(memory=64 << 20, swap=0))
    handle, _ = world.start(provider, spec, ready=False)
    seen = eventually(lambda: (one := observe(provider, handle)).oom_kills and one, 10)
    assert seen.state is BackendState.RUNNING and seen.oom_kills == 1
