"""An agent that wants out: what it tries inside, and what the host sees of it.  Needs root: each has its own user."""

import json
import os
import platform
import socket
import textwrap
from pathlib import Path

import pytest
from dispatcher_subprocess import seccomp

from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.model import Network
from tests.support.subprocess_world import PYTHON, World, eventually, lines, observe, status

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap]

ATTACKER = textwrap.dedent(
    r"""
    import ctypes, ctypes.util, errno, json, os, socket, struct, sys, platform
    libc = ctypes.CDLL(None, use_errno=True)
    plan = json.loads(sys.argv[1])
    found = {}

    def attempt(name, action):
        try:
            result = action()
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno, str(error.errno))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = f"GOT {result!r}"[:200]

    def call(*arguments):
        result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
        if result == -1:
            raise OSError(ctypes.get_errno(), "refused")
        return result

    def read(path):
        with open(path, "rb") as file:
            return file.read(64)

    def write(path):
        with open(path, "wb") as file:
            return file.write(b"x")

    def connect(family, address):
        with socket.socket(family) as sock:
            sock.settimeout(2)
            sock.connect(address)

    for path in plan["read"]:
        attempt(f"read {path}", lambda: read(path))
    for path in plan["list"]:
        attempt(f"list {path}", lambda: os.listdir(path))
    for path in plan["write"]:
        attempt(f"write {path}", lambda: write(path))
    for path in plan["unix"]:
        attempt(f"unix {path}", lambda: connect(socket.AF_UNIX, path))
    for host, port in plan["tcp"]:
        attempt(f"tcp {host}", lambda: connect(socket.AF_INET, (host, port)))
    attempt("abstract", lambda: connect(socket.AF_UNIX, "\0" + plan["abstract"]))
    for pid in plan["pids"]:
        attempt(f"kill {pid}", lambda: os.kill(pid, 9))
    attempt("kill init", lambda: os.kill(1, 9))
    for name in ("environ", "mem", "root/etc/shadow", "fd/0", "maps"):
        attempt(f"init {name}", lambda: read(f"/proc/1/{name}"))
    PTRACE_ATTACH = 16
    attempt("ptrace init", lambda: call(plan["calls"]["ptrace"], PTRACE_ATTACH, 1, 0, 0))
    attempt("setuid", lambda: os.setresuid(0, 0, 0))
    attempt("setgid", lambda: os.setresgid(0, 0, 0))
    attempt("setgroups", lambda: os.setgroups([0]))
    attempt("setuid other", lambda: os.setuid(plan["other_uid"]))
    attempt("mount", lambda: call(plan["calls"]["mount"], b"none", b"/tmp", b"tmpfs", 0, 0))
    attempt("user namespace", lambda: call(plan["calls"]["unshare"], 0x10000000))
    attempt("user namespace by clone", lambda: call(plan["calls"]["clone"], 0x10000000 | 17, 0, 0, 0, 0))
    attempt("mount namespace", lambda: call(plan["calls"]["unshare"], 0x20000))
    attempt("clone3", lambda: call(plan["calls"]["clone3"], 0, 0))
    attempt("chroot", lambda: os.chroot("/tmp"))
    attempt("mknod", lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0)))
    attempt("keys", lambda: call(plan["calls"]["keyctl"], 0, -3, 0))
    attempt("bpf", lambda: call(plan["calls"]["bpf"], 0, 0, 0))
    attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
    attempt("packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3))
    for family in range(64):
        if family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
            attempt(f"socket of family {family}", lambda: socket.socket(family, socket.SOCK_STREAM))
            attempt(f"datagram socket of family {family}", lambda: socket.socket(family, socket.SOCK_DGRAM))
    attempt("host name", lambda: socket.sethostname("evil"))
    attempt("nice", lambda: os.nice(-5))
    attempt("reboot", lambda: call(plan["calls"]["reboot"], 0xFEE1DEAD, 672274793, 0, 0))
    report = {
        "found": found,
        "pids": [int(n) for n in os.listdir("/proc") if n.isdigit()],
        "environment": dict(os.environ),
        "descriptors": sorted(n for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "nosuid": {p: bool(os.statvfs(p).f_flag & os.ST_NOSUID) for p in ("/usr", "/data", "/tmp", "/run/agent")},
        "top": sorted(os.listdir("/")),
        "dev": sorted(os.listdir("/dev")),
        "user": os.popen("id -un").read().strip(),
        "tmp_bytes": os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize,
        "keys": read("/proc/keys").decode() if os.path.exists("/proc/keys") else "",
    }
    with open("/data/report.new", "w") as file:
        json.dump(report, file)
    os.rename("/data/report.new", "/data/report")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[2])
        server.listen()
        while True:
            server.accept()[0].close()
    """
)


def system_calls():
    """Numbers of system calls on this processor."""
    machine = platform.machine()
    column = seccomp.MACHINES[machine][1]
    makers = {name: numbers[column] for name, numbers in seccomp.NAMESPACE_MAKERS.items()}
    return seccomp.refused(machine) | seccomp.absent(machine) | makers | {"ptrace": (101, 117)[column]}


def gave_up(provider, handle):
    seen = observe(provider, handle)
    assert seen.state.value == "running", (seen, lines(provider, handle))


@pytest.fixture
def world():
    made = World("7e570010")
    yield made
    made.close()


@pytest.fixture
def victim(world):
    """Another agent of the same installation, up and running."""
    provider = world.provider()
    spec = world.spec("bob", secrets={"token": "bobs-secret"})
    handle, inside = world.start(provider, spec)
    inside.write("/data/diary", b"dear diary")
    inside.write("/tmp/notes", b"notes")
    os.chmod(spec.data_dir / "diary", 0o666)
    return provider, spec, handle, inside


@pytest.fixture
def report(world, victim, monkeypatch):
    """What an attacker found, in the middle of an installation whose file modes forgive everything."""
    provider, bob, handle, _ = victim
    monkeypatch.setenv("MANAGER_SECRET", "do-not-tell")
    database = world.base / "state/dispatcher.db"
    database.write_text("everything")
    database.chmod(0o666)
    record = provider._journals.read(handle.name)
    with (
        socket.socket(socket.AF_UNIX) as manager,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.create_server(("127.0.0.1", 0)) as loopback,
    ):
        manager.bind(str(world.base / "run/manager.sock"))
        manager.listen()
        os.chmod(world.base / "run/manager.sock", 0o666)
        abstract.bind("\0dispatcher-test-7e57")
        abstract.listen()
        plan = {
            "read": [
                "/etc/shadow",
                str(database),
                str(bob.data_dir / "diary"),
                str(bob.log_dir / "output.log"),
                "/run/secrets/token",
                f"/dev/shm/dispatcher-{world.installation}-secrets-subprocess/{handle.name}/token",
                "/tmp/notes",
                "/dev/kmsg",
                "/dev/mem",
                "/proc/kcore",
                "/sys/kernel/uevent_helper",
            ],
            "list": ["/root", "/home", str(world.base), str(bob.run_dir), "/var/lib", "/sys", "/run/user"],
            "write": [
                "/usr/bin/evil",
                "/etc/evil",
                "/evil",
                "/run/evil",
                "/proc/sys/kernel/core_pattern",
                "/proc/sysrq-trigger",
                "/dev/evil",
                "/etc/passwd",
                str(bob.data_dir / "diary"),
            ],
            "unix": [
                str(world.base / "run/manager.sock"),
                str(bob.socket),
                "/run/docker.sock",
                "/var/run/docker.sock",
                "/var/run/libvirt/libvirt-sock",
                "/run/dbus/system_bus_socket",
                str(world.base / "run/p/subprocess/collector.sock"),
            ],
            "tcp": [["127.0.0.1", loopback.getsockname()[1]], ["192.0.2.1", 80]],
            "abstract": "dispatcher-test-7e57",
            "pids": [record.main.pid, record.init.pid, os.getpid()],
            "other_uid": bob.uid,
            "calls": system_calls(),
        }
        spec = world.spec("eve", [PYTHON, "-S", "-c", ATTACKER, json.dumps(plan), "{socket}"])
        world.start(provider, spec, ready=False)
        eventually(lambda: (spec.data_dir / "report").exists() or gave_up(provider, provider.handle(spec)), 20)
        return json.loads((spec.data_dir / "report").read_text())


def test_nothing_that_is_tried_succeeds(report, victim):
    print(json.dumps(report["found"], indent=1))
    assert {name: what for name, what in report["found"].items() if what.startswith("GOT")} == {}
    assert len(report["found"]) > 50
    assert victim[3].answers(), "the other agent lives on"
    assert victim[3].read("/data/diary") == b"dear diary"


def test_it_sees_itself_alone(report):
    assert sorted(report["pids"])[:2] == [1, 2] and len(report["pids"]) <= 4
    assert report["interfaces"] == ["lo"]
    assert report["descriptors"] == ["0", "1", "2"]
    assert "MANAGER_SECRET" not in report["environment"]
    assert "do-not-tell" not in json.dumps(report)
    assert set(report["environment"]) == {
        "PATH",
        "LANG",
        "HOME",
        "PWD",
        "DISPATCHER_AGENT",
        "DISPATCHER_DATA",
        "DISPATCHER_USER",
        "LOGNAME",
        "SHELL",
        "TMPDIR",
        "USER",
    }
    assert not {"root", "home", "sys", "srv", "mnt", "boot"} & set(report["top"])
    assert not {"sda", "vda", "kmsg", "mem", "kvm", "fuse", "net"} & set(report["dev"])
    assert all(report["nosuid"].values())
    assert report["user"] == "eve"
    assert report["tmp_bytes"] == 256 * 1024**2


def test_what_the_host_sees(world, victim):
    provider, spec, handle, _ = victim
    record = provider._journals.read(handle.name)
    group = provider._parts.stopper.run(record).group
    own, others = {record.main.pid, record.init.pid}, group.procs() - {record.main.pid, record.init.pid}
    assert others
    for pid in others:
        seen = status(pid)
        assert seen["Uid"].split() == [str(spec.uid)] * 4
        assert seen["Gid"].split() == [str(spec.gid)] * 4
        assert seen["Groups"].split() == []
        assert seen["NoNewPrivs"] == "1"
        assert seen["Seccomp"] == "2"
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(seen[name], 16) == 0, name
        for kind in ("mnt", "pid", "ipc", "uts", "net"):
            assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
        assert os.getsid(pid) not in {os.getsid(0), os.getsid(record.main.pid)}
    for pid in own:  # bubblewrap's own two: root by name, with no right to anything
        seen = status(pid)
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(seen[name], 16) == 0, name
        command = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert b"bobs-secret" not in command
        assert str(spec.data_dir).encode() not in command, "paths of agents are nobody's business"
    assert observe(provider, handle).owner_uid == spec.uid


def test_the_hosts_network_is_asked_for(world):
    provider = world.provider()
    with socket.create_server(("127.0.0.1", 0)) as loopback:
        to = f"tcp:127.0.0.1:{loopback.getsockname()[1]}"
        _, none = world.start(provider, world.spec("alone"))
        assert none.refused("/connect", to=to)
        _, host = world.start(provider, world.spec("open", network=Network.HOST))
        assert not host.refused("/connect", to=to)


def test_loader_variables_do_not_reach_roots_programs(world):
    """LD_PRELOAD of an app is the app's: bubblewrap and setpriv run as root and must not obey it."""
    marker = world.base / "loaded"
    source = world.base / "evil.c"
    source.write_text(
        "#include <fcntl.h>\n#include <unistd.h>\n#include <stdlib.h>\n#include <stdio.h>\n"
        "static void __attribute__((constructor)) begin(void) { char name[64]; "
        'snprintf(name, sizeof name, "/data/loaded-%d", (int)geteuid()); close(open(name, O_CREAT | O_WRONLY, 0600)); }\n'
    )
    provider = world.provider()
    spec = world.spec("eve", environment={"LD_PRELOAD": "{data}/evil.so", "PLAIN": "it's $HOME `x`\n"})
    os.system(f"gcc -shared -fPIC -o {spec.data_dir}/evil.so {source}")
    assert (spec.data_dir / "evil.so").exists()
    os.chmod(spec.data_dir / "evil.so", 0o755)
    _, inside = world.start(provider, spec)
    assert inside.environment()["LD_PRELOAD"] == "/data/evil.so"
    assert inside.environment()["PLAIN"] == "it's $HOME `x`\n"
    assert {path.name for path in spec.data_dir.glob("loaded-*")} == {f"loaded-{spec.uid}"}
    assert not marker.exists()


def test_paths_that_would_show_other_agents_are_refused(world):
    provider = world.provider()
    for path in (
        "/",
        "/run",
        "/proc",
        str(world.base),
        str(world.base / "state"),
        str(world.base / "state/agents"),
    ):
        spec = world.spec("eve", options={"read_only": [path]})
        with pytest.raises(ConfigError, match="cannot be shown"):
            world.start(provider, spec, ready=False)
    link = world.base / "innocent"
    link.symlink_to(world.base / "state/agents")
    with pytest.raises(ConfigError, match="cannot be shown"):
        world.start(provider, world.spec("eve", options={"writable": [str(link)]}), ready=False)
