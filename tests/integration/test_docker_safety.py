"""What `docker inspect` and the app itself show of the walls; what private networks reach; data over renewals."""

import errno
import os
import socket
import subprocess

import pytest

from dispatcher.plugin.errors import ConfigError, DispatcherError
from dispatcher.plugin.model import Network
from dispatcher.testing.probe_client import Refused
from tests.support.outside import Outside
from tests.support.docker_tools import PORTED, DockerWorld, docker, inspect, leftovers

pytestmark = [pytest.mark.docker, pytest.mark.root]


@pytest.fixture
def world(docker_world):
    return docker_world


def test_the_walls_as_the_engine_shows_them(world):
    agent = world.run("walls")
    found = inspect(agent.handle.name)
    host = found["HostConfig"]
    assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], [], False)
    assert [one[:20] for one in host["SecurityOpt"]] == ["no-new-privileges:tr", 'seccomp={"defaultAct']
    assert (host["ReadonlyRootfs"], host["NetworkMode"]) == (True, "none")
    assert found["Config"]["User"] == f"{agent.spec.uid}:{agent.spec.gid}"
    status = agent.inside.read("/proc/self/status").decode()
    assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status


def test_sockets_of_other_families_are_refused(world):
    """AF_VSOCK is one space for all agents, the host and its machines, whatever their network."""
    agent = world.run("families")
    script = (
        "import socket\n"
        "for family in range(64):\n"
        "    try:\n        socket.socket(family, socket.SOCK_STREAM if family < 16 else socket.SOCK_DGRAM).close()\n"
        "    except OSError as error:\n        result = error.errno\n"
        "    else:\n        result = 0\n"
        "    print(family, result)\n"
    )
    lines = docker("exec", agent.handle.name, "python3", "-c", script).splitlines()
    found = dict(tuple(map(int, line.split())) for line in lines)
    assert {family for family, error in found.items() if error != errno.EPERM} == {1, 2, 10, 16}
    assert (
        found[socket.AF_UNIX] == found[socket.AF_INET] == found[socket.AF_INET6] == found[socket.AF_NETLINK] == 0
    )


def test_asynchronous_io_of_the_kernel_is_refused(world):
    """Its requests are limited for the whole host (fs.aio-max-nr), and one agent could take all."""
    agent = world.run("aio")
    numbers = {"x86_64": 206, "aarch64": 0}
    script = (
        "import ctypes, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"number = {numbers}[platform.machine()]\n"
        "print(libc.syscall(number, 64, ctypes.byref(ctypes.c_ulong(0))), ctypes.get_errno())\n"
    )
    assert docker("exec", agent.handle.name, "python3", "-c", script).split() == ["-1", str(errno.ENOSYS)]


def test_ordinary_programs_run_under_the_profile(world):
    """Threads, processes, timers, files and names: what the C library asks for first, and falls back from."""
    agent = world.run("ordinary")
    script = (
        "import os, subprocess, threading, tempfile, socket, mmap, select, multiprocessing\n"
        "threads = [threading.Thread(target=lambda: None) for _ in range(20)]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]\n"
        "print(subprocess.run(['true']).returncode, len(tempfile.mkdtemp()) > 0)\n"
        "a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))\n"
        "os.memfd_create('x'); select.epoll(); mmap.mmap(-1, 4096); os.sched_getaffinity(0); os.getxattr\n"
        "print(socket.getaddrinfo('localhost', 80)[0][4][0]); os.statvfs('/'); os.pidfd_open(os.getpid())\n"
        "pid = os.fork()\nif not pid: os._exit(0)\nprint(os.waitpid(pid, 0)[1])\n"
    )
    said = docker("exec", agent.handle.name, "python3", "-c", script).split("\n")
    assert [said[0], said[1], said[3]] == ["0 True", "b'x'", "0"]
    for denied in ("unshare -U true", "mount -t tmpfs x /tmp", "chroot / true"):
        done = subprocess.run(["docker", "exec", agent.handle.name, "sh", "-c", denied], capture_output=True)
        assert done.returncode, denied


def test_only_data_and_tmp_can_be_written(world):
    agent = world.run("writer")
    agent.inside.write("/data/x", b"x")
    agent.inside.write("/tmp/x", b"x")
    for path in ("/etc/x", "/usr/bin/x", "/probe.py", "/run/x", "/proc/sys/kernel/hostname", "/sys/x"):
        with pytest.raises(Refused):
            agent.inside.write(path, b"x")


def test_no_namespace_of_the_host_is_shared(world):
    agent = world.run("names")
    for name in ("pid", "mnt", "ipc", "uts", "net"):
        refused = agent.inside.refused("/read", path=f"/proc/self/ns/{name}")
        assert refused  # a link that cannot be read as a file: its target is compared from the host
        pid = inspect(agent.handle.name)["State"]["Pid"]
        assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")


def test_a_loosened_app_has_what_it_names_and_no_more(world):
    agent = world.run("loose", options={"read_only": False, "cap_add": ["NET_BIND_SERVICE"], "user": "root"})
    agent.inside.write("/data/x", b"x")
    agent.inside.write("/etc/x", b"x")
    status = agent.inside.read("/proc/self/status").decode()
    assert "CapEff:\t00000000000004cb" in status  # CHOWN DAC_OVERRIDE FOWNER SETGID SETUID NET_BIND_SERVICE
    assert agent.inside.id()["uid"] == "0"
    said = [one.what for one in world.driver.provider.explain(agent.spec.app)]
    for words in ("runs as root", "change the image's files", "capability NET_BIND_SERVICE"):
        assert any(words in one for one in said), words


def test_a_mount_of_the_operator_is_read_only_unless_said(world, tmp_path):
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:  # not /tmp itself
        parent.chmod(0o755)
    (tmp_path / "hello").write_text("hello\n")
    mounts = [{"source": str(tmp_path), "target": "/shared"}]
    agent = world.run("mounted", options={"mounts": mounts})
    assert agent.inside.read("/shared/hello") == b"hello\n"
    with pytest.raises(Refused):
        agent.inside.write("/shared/x", b"x")


def test_no_way_to_the_engine_s_socket(world):
    for source in ("/var/run/docker.sock", "/run", "/"):
        spec = world.make("sneaky", options={"mounts": [{"source": source, "target": "/x"}]})
        with pytest.raises(ConfigError, match="reaches the socket"):
            world.driver.ensure(spec)
    assert not leftovers(world.installation)


def test_private_networks_keep_agents_apart_and_off_the_host(world):
    alice = world.run("alice", options=PORTED, network=Network.PRIVATE)
    bob = world.run("bob", options=PORTED, network=Network.PRIVATE)
    networks = inspect(bob.handle.name)["NetworkSettings"]["Networks"]
    (settings,) = networks.values()
    address, gateway = settings["IPAddress"], settings["Gateway"]
    assert socket.create_connection((address, 8080), 5).close() is None, "the host itself can"
    assert alice.inside.refused("/connect", to=f"tcp:{address}:8080")
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        for target in (gateway, "127.0.0.1"):
            assert alice.inside.refused("/connect", to=f"tcp:{target}:{port}"), target
    assert alice.inside.refused("/connect", to=str(bob.inside.endpoint))
    assert alice.inside.endpoint.host == "127.0.0.1"


def test_private_networks_reach_the_outside(world):
    """The outside is a namespace that the test makes: a routed peer behind a veth pair."""
    agent = world.run("traveller", options=PORTED, network=Network.PRIVATE)
    with Outside() as outside:
        assert agent.inside.refused("/connect", to=f"tcp:{outside.address}:{outside.port}") == ""


METADATA = ("169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254")


def reached(agent, address, port=7777):
    """Whether an agent can connect to an address."""
    host = f"[{address}]" if ":" in address else address
    return not agent.inside.refused("/connect", to=f"tcp:{host}:{port}")


@pytest.fixture
def dual(world):
    """The installation's bridge with IPv6, as a daemon with `default-network-opts` makes it."""
    name, interface = world.make("curious").backend_name, f"dsp-{world.installation}fff"
    docker(
        *("network", "create", "--ipv6", "--subnet", "fd77::/64", "--label"),
        *(
            f"dispatcher.installation={world.installation}",
            "-o",
            f"com.docker.network.bridge.name={interface}",
            name,
        ),
    )


def test_private_networks_do_not_reach_clouds_metadata(world, dual):
    agent = world.run("curious", options=PORTED, network=Network.PRIVATE)
    (settings,) = inspect(agent.handle.name)["NetworkSettings"]["Networks"].values()
    assert settings["GlobalIPv6Address"]
    with Outside(*METADATA, "fd77:1::2") as outside:
        for control in (outside.address, "fd77:1::2"):
            assert any(reached(agent, control) for _ in range(5)), "IPv6 needs a moment on a new link"
        assert [one for one in METADATA if reached(agent, one)] == []
        subprocess.run(
            ["ip", "addr", "add", "fe80::a9fe:a9fe/64", "dev", f"dsp-{world.installation}fff", "nodad"], check=True
        )
        with socket.create_server(("::", 7777), family=socket.AF_INET6):
            for address in ("fe80::a9fe:a9fe%eth0", settings["IPv6Gateway"] or "fd77::1"):
                assert not reached(agent, address)
        # A reload of the host's firewall removes the rules; they come back while the agent runs.
        for program in ("iptables", "ip6tables"):
            subprocess.run([program, "-F", f"dsp-{world.installation}"], check=True)
        assert reached(agent, METADATA[0])
        world.driver.list()
        assert [one for one in METADATA if reached(agent, one)] == []


def test_networks_of_the_operator_s_choice_are_denied(world):
    careful = DockerWorld(deny=["198.18.77.0/24"])
    try:
        agent = careful.run("careful", options=PORTED, network=Network.PRIVATE)
        with Outside("198.19.0.2") as outside:
            assert not reached(agent, outside.address)
            assert reached(agent, "198.19.0.2")
    finally:
        careful.close()


def test_the_rules_go_with_the_network(world):
    agent = world.run("last", options=PORTED, network=Network.PRIVATE)
    rules = lambda: subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    other = world.run("other", options=PORTED, network=Network.PRIVATE)
    world.driver.destroy(other.handle)
    assert f"dsp-{world.installation}" in rules(), "an agent needs them still"
    world.driver.destroy(agent.handle)
    assert f"dsp-{world.installation}" not in rules()


def test_a_manager_that_ended_while_it_asked_for_a_range_leaves_nothing(world):
    probe = f"dispatcher-{world.installation}-range"
    docker("network", "create", "--label", f"dispatcher.installation={world.installation}", probe)
    agent = world.run("last", options=PORTED, network=Network.PRIVATE)
    docker("network", "create", "--label", f"dispatcher.installation={world.installation}", probe, check=False)
    world.driver.destroy(agent.handle)
    assert not leftovers(world.installation)


def test_a_network_goes_with_its_agent(world):
    agent = world.run("last", options=PORTED, network=Network.PRIVATE)
    assert leftovers(world.installation) >= {f"network {agent.handle.name}"}
    world.driver.stop(agent.handle)
    again = world.run("last", options=PORTED, network=Network.PRIVATE)
    assert again.inside.read("/etc/hostname"), "it runs again"
    world.driver.destroy(agent.handle)
    assert not leftovers(world.installation)


def test_a_start_that_fails_leaves_no_network(world):
    with pytest.raises(DispatcherError):
        world.run(
            "absent", options={**PORTED, "command": ["/nothing/there"], "init": False}, network=Network.PRIVATE
        )
    assert not leftovers(world.installation)


#: Ask the engine's name server, as a resolver library does: whose address is that, what is the address of a name?
ASK = """
import socket, struct, sys
def ask(name, kind):
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.sendto(struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\\0" + struct.pack(">2H", kind, 1), ("127.0.0.11", 53))
    try:
        return struct.unpack(">6H", sock.recv(4096)[:12])[3]  # answers
    except TimeoutError:
        return 0
print([ask(name, kind) for name, kind in zip(sys.argv[1::2], map(int, sys.argv[2::2]))])
"""

#: Send to many addresses around one's own; print how many neighbours the kernel has looked for.
KNOCK = """
import ipaddress, pathlib, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own = int(ipaddress.ip_address(sys.argv[1]))
for number in range(-400, 400):
    try:
        sock.sendto(b"x", (str(ipaddress.ip_address(own + number)), 9))
    except OSError:
        pass
print(len(pathlib.Path("/proc/net/arp").read_text().splitlines()) - 1)
"""


def address_of(agent):
    (settings,) = inspect(agent.handle.name)["NetworkSettings"]["Networks"].values()
    return settings["IPAddress"]


def test_the_engines_name_server_tells_an_agent_of_no_other(world):
    """Container names hold user names."""
    alice = world.run("alice", options=PORTED, network=Network.PRIVATE)
    bob = world.run("bob", options=PORTED, network=Network.PRIVATE)

    def questions(agent):
        backwards = ".".join(reversed(address_of(agent).split("."))) + ".in-addr.arpa"
        return backwards, "12", agent.handle.name, "1"

    command = ("exec", alice.handle.name, "python3", "-c", ASK)
    assert docker(*command, *questions(alice), *questions(bob)).strip() == "[1, 1, 0, 0]"


def test_an_agent_has_few_neighbours(world):
    """The kernel's table of neighbours is one for the host and all namespaces, and has 1,024 entries."""
    agent = world.run("neighbour", options=PORTED, network=Network.PRIVATE)
    found = docker("exec", agent.handle.name, "python3", "-c", KNOCK, address_of(agent))
    assert int(found) < 8


#: Send a datagram to many places.
SPREAD = """
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(5000):
    try:
        sock.sendto(b"x", (f"198.18.100.{number % 250 + 1}", 2000 + number // 250))
    except OSError:
        pass
    if number % 100 == 0:
        time.sleep(0.002)
"""

#: Connect for ten seconds, one after the other; print how many times.
HURRY = """
import socket, sys, time
count, end = 0, time.monotonic() + 10
while time.monotonic() < end:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()
        count += 1
    except OSError:
        pass
print(count)
"""


def tracked(address):
    """Count the connections that the host tracks for an address."""
    with open("/proc/net/nf_conntrack", encoding="ascii") as lines:
        return sum(f"src={address} " in line.partition("dst=")[0] for line in lines)


def test_an_agent_does_not_fill_the_hosts_table_of_connections(world):
    spreader, hurrier = (world.run(n, options=PORTED, network=Network.PRIVATE) for n in ("spreader", "hurrier"))
    run = lambda agent, *words: docker("exec", agent.handle.name, "python3", "-c", *words)
    with Outside("198.18.100.0/24") as outside:
        for _ in range(3):
            run(spreader, SPREAD)
            assert 500 < tracked(address_of(spreader)) <= 1024
            world.driver.list()  # renews the rules, which go on counting
            world.run("another", options=PORTED, network=Network.PRIVATE)
        assert 500 < int(run(hurrier, HURRY, "198.18.100.1", str(outside.port))) < 3000
        assert reached(world.run("quiet", options=PORTED, network=Network.PRIVATE), "198.18.100.1")
    assert not [one for one in world.driver.explain(None) if "tracked connections" in one.what]


def test_networks_are_made_beside_each_other_and_beside_those_of_other_installations(world):
    """Each installation takes the range that the engine would, so both may take the same one."""
    other = DockerWorld()
    try:
        agents = world.together(
            [
                lambda n=n, where=where: where.run(f"side{n}", options=PORTED, network=Network.PRIVATE)
                for n in range(3)
                for where in (world, other)
            ]
        )
        assert len({address_of(agent) for agent in agents}) == 6
        assert not reached(agents[0], address_of(agents[1]), 8080)
        assert not reached(agents[0], address_of(agents[2]), 8080)
    finally:
        other.close()


def test_a_named_network_is_joined(world):
    name = f"kit-{world.installation}"
    docker("network", "create", name)
    try:
        agent = world.run("joined", options={**PORTED, "network": name}, network=Network.PRIVATE)
        assert list(inspect(agent.handle.name)["NetworkSettings"]["Networks"]) == [name]
        world.end_check()
    finally:
        docker("network", "rm", name)


def test_data_outlives_image_and_options(world, tmp_path):
    agent = world.run("keeper")
    agent.inside.write("/data/note", b"mine\n")
    world.driver.stop(agent.handle, grace=5)
    agent = world.run("keeper", options={"tmpfs": {"/tmp": "8M", "/var/tmp": "8M"}})
    assert agent.inside.read("/data/note") == b"mine\n"
    assert (agent.spec.data_dir / "note").stat().st_uid == agent.spec.uid
    world.driver.destroy(agent.handle)
    assert (agent.spec.data_dir / "note").read_bytes() == b"mine\n"


def test_volumes_go_only_when_asked(world):
    volumes = DockerWorld(data="volume")
    try:
        agent = volumes.run("vera")
        agent.inside.write("/data/note", b"mine\n")
        volumes.driver.destroy(agent.handle, data=False)
        assert leftovers(volumes.installation) == {f"volume {agent.handle.name}-data"}
        agent = volumes.run("vera")
        assert agent.inside.read("/data/note") == b"mine\n"
        volumes.driver.destroy(agent.handle, data=True)
        assert not leftovers(volumes.installation)
    finally:
        volumes.close()


def test_a_hostile_volume_hurts_nobody_on_its_way_out(world, tmp_path):
    """Links out of the tree, devices' names, setuid bits: copied as what they are, by the agent's user."""
    volumes = DockerWorld(data="volume")
    try:
        agent = volumes.run("mallory")
        docker(
            "exec",
            agent.handle.name,
            "sh",
            "-c",
            "cd /data && ln -s /etc/shadow shadow && ln -s / root && mkdir d && ln -s ../../../../../tmp d/up && cp /bin/ls su && chmod 4755 su && printf x > $'a\\nb' && mkfifo pipe",
        )
        volumes.driver.stop(agent.handle)
        target = tmp_path / "out"
        target.mkdir()
        for parent in tmp_path.parents[:2]:  # not /tmp itself
            parent.chmod(0o755)
        volumes.driver.export_data(agent.handle, target)
        assert os.readlink(target / "shadow") == "/etc/shadow"
        assert os.readlink(target / "d/up") == "../../../../../tmp"
        uid = agent.spec.uid
        assert {
            os.lstat(os.path.join(here, name)).st_uid
            for here, dirs, files in os.walk(target)
            for name in dirs + files
        } == {uid}
    finally:
        volumes.close()


def test_ports_that_are_taken_at_once_stay_apart(world):
    """Agents started at the same time on one bridge get a port each, and the right one."""
    made = world.together(
        [lambda n=n: world.run(f"port{n}", options=PORTED, network=Network.PRIVATE) for n in range(8)]
    )
    names = [agent.inside.environment()["DISPATCHER_AGENT"] for agent in made]
    assert names == [f"port{n}" for n in range(8)]
