"""libvirt: real guests, beyond the conformance kit.  Few guests, each with many checks."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import websockets

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Conflict, ProviderError
from dispatcher.plugin.model import BackendState, Capability, Depth, Limits, Network
from dispatcher.testing.probe_client import Inside
from dispatcher.testing.kit import eventually
from tests.support import vm
from tests.support.outside import Outside
from tests.support.vm_world import World, get, quiet

pytest.importorskip("libvirt")

from dispatcher_libvirt.connection import Backend
from dispatcher_libvirt.network import NetworkFilters
from dispatcher_libvirt.new_connections import NewConnections

pytestmark = [pytest.mark.libvirt, pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def private_network():
    """A libvirt network of the test's own, without the delay that spanning tree makes."""
    name = "dispatcher-test"
    xml = f"""<network><name>{name}</name><forward mode='nat'/><bridge name='virbr-disp' stp='off'/>
    <ip address='192.168.237.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.237.10' end='192.168.237.99'/></dhcp></ip></network>"""
    vm.virsh("net-destroy", name)
    path = Path("/tmp", f"{name}-{os.getpid()}.xml")
    path.write_text(xml)
    try:
        assert "created" in vm.virsh("net-create", str(path)) or name in vm.virsh("net-list")
        yield name
    finally:
        path.unlink()
        vm.virsh("net-destroy", name)


def test_an_app_on_an_overlay_is_used_renewed_and_rolled_back(world):
    """HTTP, WebSocket, data on its disk; a new base image keeps the data, and the old state can be restored."""
    images = vm.images()
    base = world.root / "base.qcow2"
    base.write_bytes((images / "root.qcow2").read_bytes())
    base.chmod(0o644)
    options = {
        "image": str(base),
        "kernel": str(images / "vmlinuz"),
        "initrd": str(images / "initrd.img"),
        "default_memory": "192M",
        "data_size": "32M",
    }
    spec = world.spec("alice", **options)
    handle = world.ensure(spec)
    endpoint = world.ready(handle)
    page = get(endpoint, "/").decode()
    assert "A machine for alice" in page
    assert get(endpoint, "/notes", "POST", b"note=remember+the+milk") == b""
    assert "remember the milk" in get(endpoint, "/").decode()
    assert get(endpoint, "/count", "POST") == b"1\n"

    async def speak():
        url = f"ws://{endpoint.host}:{endpoint.port}"
        async with websockets.connect(f"{url}/echo") as echo:
            await echo.send("héllo" * 100)
            assert await echo.recv() == "héllo" * 100
        async with websockets.connect(f"{url}/clock") as clock:
            assert float(await asyncio.wait_for(clock.recv(), 10)) >= 0

    asyncio.run(speak())
    directory = world.machines / handle.name
    (first,) = directory.glob("root-*.qcow2")
    world.provider.stop(handle, grace=20, deadline=Deadline(60), progress=quiet)
    assert world.state(handle) is BackendState.ABSENT
    assert first.exists(), "a stopped agent keeps its overlay"

    os.utime(base, (1_700_000_000, 1_700_000_000))  # another image in the old one's place
    larger = world.spec("alice", limits=Limits(disk=96 << 20), **options)
    world.ensure(larger)
    endpoint = world.ready(handle)
    assert "remember the milk" in get(endpoint, "/").decode(), "the data disk outlives its image, and grew"
    assert (directory / "data.raw").stat().st_size == 96 << 20
    assert get(endpoint, "/count") == b"0\n"
    second = {path.name for path in directory.glob("root-*.qcow2")}
    assert first.name in second, "the old image's overlay is kept for a roll-back"
    assert len(second) == 2
    assert [path.name.startswith("data-") for path in (directory / "snapshots").iterdir()] == [True]
    get(endpoint, "/notes", "POST", b"note=written+later")
    world.provider.stop(handle, grace=20, deadline=Deadline(60), progress=quiet)
    assert "written later" in (world.export(handle) / "notes.txt").read_text()
    (snapshot,) = (directory / "snapshots").iterdir()
    snapshot.rename(directory / "data.raw")  # as docs/reference/libvirt.md tells the operator
    out = world.export(handle)
    assert (out / "notes.txt").read_text() == "remember the milk\n", "the data is as it was before the new image"


def test_a_disk_image_with_its_own_boot_loader_boots(world):
    images = vm.images()
    spec = world.spec(
        "grub", image=str(images / "disk.qcow2"), default_memory="256M", data_size="32M", root="fresh"
    )
    handle = world.ensure(spec)
    endpoint = world.ready(handle, 120)
    get(endpoint, "/notes", "POST", b"note=x")
    assert "<li>x</li>" in get(endpoint, "/").decode()


def test_isolation_holds_from_inside(world):
    """A guest reaches neither the host's loopback interface, by any address, nor another guest's port."""
    alice, bob = world.probe("alice"), world.probe("bob")
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(0.1)
        own = [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
        for host in ["127.0.0.1", "10.0.2.2", "10.0.2.3", *own]:
            assert alice.refused("/connect", to=f"tcp:{host}:{port}"), host
        with pytest.raises(TimeoutError):
            listener.accept()
    for host in ("10.0.2.2", "127.0.0.1"):
        assert alice.refused("/connect", to=f"tcp:{host}:{bob.endpoint.port}")
    assert alice.refused("/connect", to="tcp:10.0.2.3:53")
    assert alice.refused("/connect", to="tcp:192.0.2.1:80")


def test_sleep_wakes_with_its_memory_on_another_port_if_it_must(world):
    inside = world.probe("alice")
    handle = world.handles["alice"]
    inside.post("/count")
    usage = world.provider.usage([handle], deadline=Deadline(10))[handle.name]
    assert usage.memory > 50 << 20
    assert 0 < usage.disk <= usage.disk_limit, "of the data disk"
    world.provider.suspend(handle, depth=Depth.DISK, deadline=Deadline(60), progress=quiet)
    assert world.state(handle) is BackendState.HIBERNATED
    assert world.provider.usage([handle], deadline=Deadline(10)) == {}, "its memory is free"
    assert not [name for name in vm.leftovers(world.installation, world.root) if "process" in name]
    with pytest.raises(Conflict, match="stop the agent first"):
        world.export(handle)
    with socket.create_server(("127.0.0.1", inside.endpoint.port)):
        world.provider.resume(handle, deadline=Deadline(60), progress=quiet)
        seen = world.observe(handle)
        assert seen.endpoint.port != inside.endpoint.port
        assert Inside(seen.endpoint).get("/count") == b"1\n"
    fresh = world.another()
    assert fresh.observe(handle, deadline=Deadline(10)).endpoint == seen.endpoint
    fresh.close()
    # Woken to be ended, so that what it had not written yet is not lost.
    Inside(seen.endpoint).write("/data/kept", b"kept\n")
    world.provider.suspend(handle, depth=Depth.DISK, deadline=Deadline(60), progress=quiet)
    world.provider.stop(handle, grace=20, deadline=Deadline(90), progress=quiet)
    out = world.export(handle)
    assert (out / "kept").read_bytes() == b"kept\n"
    assert (out / "saved").read_bytes() == b"signal 15\n"


@pytest.mark.libvirt_restart
def test_a_killed_qemu_and_a_stopped_libvirtd_are_distinguished(world):
    """kill -9 of QEMU ends the agent and is reported within a second; kill -9 of libvirtd ends none."""
    inside = world.probe("alice")
    handle, heard = world.handles["alice"], []
    watch = world.provider.watch(heard.append)
    start = inside.id()["start"]
    vm.kill_libvirtd()
    try:
        assert inside.id()["start"] == start, "guests go on serving"
        with pytest.raises(Exception, match="libvirt does not answer on this host") as caught:
            world.observe(handle)
        assert caught.value.code == "unavailable"
    finally:
        vm.start_libvirtd()
    assert world.state(handle) is BackendState.RUNNING
    fresh = world.another()
    ((found, seen),) = fresh.list(deadline=Deadline(20))
    assert (found, seen.state, seen.endpoint) == (handle, BackendState.RUNNING, inside.endpoint)
    fresh.ensure(world.specs["alice"], deadline=Deadline(20), progress=quiet)
    assert inside.id()["start"] == start, "adopted, not started again"
    fresh.close()
    assert eventually(lambda: "" in heard, 15), "the gap is told"
    heard.clear()
    (pid,) = vm.qemus(handle.name)
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: handle.name in heard, 3)
    assert eventually(lambda: world.state(handle) is BackendState.STOPPED, 5)
    assert world.observe(handle).exit_reason == "QEMU crashed or was killed"
    watch.close()


def test_a_libvirt_network_reaches_the_outside_and_not_the_host(world, private_network):
    world.restart_provider(network=private_network)
    spec = world.spec("alice", network=Network.PRIVATE, **vm.app_options())
    handle = world.ensure(spec)
    inside = world.inside(handle)
    assert inside.endpoint.host.startswith("192.168.237.")
    assert any("filter" in one for one in vm.leftovers(world.installation, world.root))
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(0.1)
        addresses = {
            "192.168.237.1",
            *(entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, 2)),
        }
        for host in addresses - {"127.0.0.1", "127.0.1.1"}:
            assert inside.refused("/connect", to=f"tcp:{host}:{port}"), host
        with pytest.raises(TimeoutError):
            listener.accept()
    metadata = ["169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254"]
    with Outside("203.0.113.5", *metadata) as outside:
        for host in metadata:
            connect = ["ip", "netns", "exec", outside.name, "ip", "-o", "addr"]
            assert host in subprocess.run(connect, capture_output=True, text=True).stdout
            assert inside.refused("/connect", to=f"tcp:[{host}]:{outside.port}"), host
        assert inside.refused("/connect", to=f"tcp:203.0.113.5:{outside.port}") == "", "the outside is reached"
    world.provider.destroy(handle, data=True, deadline=Deadline(60), progress=quiet)
    assert vm.leftovers(world.installation, world.root) == set()


#: Sent from vera's machine: DHCP messages in her own name and in others'.
FORGED = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
server = socket.inet_aton("192.168.237.1")
def dhcp(kind, mac, address="0.0.0.0", want=None):
    mac = bytes.fromhex(mac.replace(":", ""))
    head = bytes([1, 1, 6, 0]) + mac[2:] + bytes([0, 0, 0x80, 0]) + socket.inet_aton(address)
    message = head + bytes(12) + mac + bytes(10 + 64 + 128) + bytes.fromhex("63825363") + bytes([53, 1, kind])
    message += bytes([54, 4]) + server + (bytes([50, 4]) + socket.inet_aton(want) if want else b"") + bytes([255])
    for to in ("255.255.255.255", "192.168.237.255", "192.168.237.1"):
        sock.sendto(message.ljust(300, bytes(1)), (to, 67))
dhcp(7, VERA_MAC, VERA)
dhcp(7, VLAD_MAC, VLAD)
dhcp(4, VLAD_MAC, want=VLAD)
dhcp(3, VLAD_MAC, want=VERA)
for n in range(10, 100):
    dhcp(3, f"52:54:00:09:09:{n:02x}", want=f"192.168.237.{n}")
print("sent")
"""
RESOLVE = """
import socket
assert open("/etc/resolv.conf").read() == "nameserver 192.168.237.1\\n"
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
sock.sendto(bytes.fromhex("00070100000100000000000001780000010001"), ("192.168.237.1", 53))
assert sock.recv(512).startswith(bytes([0, 7]))
print("sent")
"""
KNOCK = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
for address in ADDRESSES:
    for _ in range(3):
        sock.sendto(address.encode(), (address, PORT))
print("sent")
"""
#: Connects for four seconds, one after the other, and asks for a name meanwhile; sends datagrams to many ports.
HURRY = """
import socket, threading, time
question = bytes.fromhex("00070100000100000000000001780000010001")
names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
names.settimeout(0.005)
def connect():
    try:
        socket.create_connection(("203.0.113.5", PORT), 0.02).close()
    except OSError:
        pass
def ask():
    names.sendto(question, ("192.168.237.1", 53))
    try:
        names.recv(512)
    except OSError:
        pass
def keep_on(what):
    while time.monotonic() < end:
        what()
end = time.monotonic() + 4
threads = [threading.Thread(target=keep_on, args=(what,)) for what in (connect, ask)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for port in range(2000, 4000):
    try:
        datagrams.sendto(b"x", ("203.0.113.5", port))
    except OSError:
        pass
print("sent")
"""
CROWD = """
import socket, time
begin = time.monotonic()
kept = [socket.create_connection(("203.0.113.5", PORT), 5) for _ in range(100)]
assert time.monotonic() - begin < 3
print("sent")
"""


def run(endpoint, code, **values):
    """Run Python code in a machine with `vm_shell`."""
    assigned = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    assert get(endpoint, "/", "POST", (assigned + code).encode()) == b"sent\n"


def tracked(address):
    """Count the connections that the host tracks for an address; one of TCP stays for two minutes after its end."""
    with open("/proc/net/nf_conntrack", encoding="ascii") as lines:
        return sum(f"src={address} " in line.partition("dst=")[0] for line in lines)


def test_a_guest_gets_neither_anothers_traffic_nor_services_nor_all_connections_of_the_host(
    world, private_network
):
    """Neither forged DHCP nor multicast nor broadcast leave a machine, whose address the provider chose."""
    shell = vm.IMAGES / "shell.img"
    vm.images()
    vm.with_app(shell, vm.IMAGES / "initrd.img", Path(vm.__file__).with_name("vm_shell.py"))
    world.restart_provider(network=private_network)
    specs = [
        world.spec(name, network=Network.PRIVATE, **vm.app_options(initrd=str(shell))) for name in ("vera", "vlad")
    ]
    handles = [world.ensure(spec) for spec in specs]
    vera, vlad = (world.ready(handle) for handle in handles)
    assert get(vlad, "/") == b"vlad"
    macs = [re.search(r"52:54:\S+", vm.virsh("domiflist", one.name)).group() for one in handles]
    assert len({vera.host, vlad.host, *macs}) == 4
    run(vera, RESOLVE)
    run(vera, FORGED, VERA=vera.host, VLAD=vlad.host, VERA_MAC=macs[0], VLAD_MAC=macs[1])
    assert vm.virsh("net-dhcp-leases", private_network).strip() == ""
    world.provider.stop(handles[1], grace=20, deadline=Deadline(60), progress=quiet)
    world.ensure(specs[1])
    vlad = world.ready(handles[1])
    assert vlad.host != vera.host
    assert (get(vera, "/"), get(vlad, "/")) == (b"vera", b"vlad")

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind(("", 0))
        port, group = listener.getsockname()[1], "239.255.255.250"
        membership = socket.inet_aton(group) + socket.inet_aton("192.168.237.1")
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        every = [one for found in psutil.net_if_addrs().values() for one in found if one.family == socket.AF_INET]
        own = {one.broadcast for one in every if one.broadcast}
        run(vera, KNOCK, PORT=port, ADDRESSES=[group, "224.0.0.1", "255.255.255.255", "192.168.237.1", *own])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"host", ("192.168.237.1", port))
        assert listener.recv(100) == b"host", "nothing arrived before"

    with Outside("203.0.113.5") as outside:
        begin = time.monotonic()
        run(vera, CROWD, PORT=outside.port)
        run(vera, HURRY, PORT=outside.port)
        assert 200 < tracked(vera.host) < 1000 + 50 * (time.monotonic() - begin)
    assert not [one for one in world.provider.explain(specs[0].app) if "tracked connections" in one.what]
    table = ["table", "ip", f"dispatcher-{world.installation}"]
    subprocess.run(["nft", "delete", *table], check=True)

    world.provider.suspend(handles[1], depth=Depth.DISK, deadline=Deadline(60), progress=quiet)
    world.provider.destroy(handles[0], data=True, deadline=Deadline(60), progress=quiet)
    world.provider.resume(handles[1], deadline=Deadline(60), progress=quiet)
    fresh = world.another(network=private_network)
    ((_, seen),) = fresh.list(deadline=Deadline(20))
    fresh.close()
    assert seen.endpoint == vlad, "the address stays over sleep and a restart of the manager"
    rules = subprocess.run(["nft", "list", *table], check=True, capture_output=True, text=True).stdout
    assert f"{{ {vlad.host} }}" in rules, "rules that somebody has removed are set again"
    assert get(world.ready(handles[1]), "/") == b"vlad"
    world.provider.stop(handles[1], grace=20, deadline=Deadline(60), progress=quiet)
    assert not {one for one in vm.leftovers(world.installation) if not one.startswith("file")}, (
        "its address is free"
    )


def test_two_installations_on_one_network_share_its_addresses():
    """libvirt itself refuses a second reservation; a persistent network keeps them when it starts again."""
    name, path = "dispatcher-shared", Path("/tmp", f"dispatcher-shared-{os.getpid()}.xml")
    path.write_text(
        f"<network><name>{name}</name><forward mode='nat'/><bridge name='virbr-dispsh' stp='off'/>"
        "<ip address='192.168.236.1' netmask='255.255.255.224'/></network>"
    )
    backend = Backend("qemu:///system", connections=4, keepalive=5)
    rates = {name: NewConnections(name, local=True, privileged=True) for name in ("aaaa0001", "aaaa0002")}
    both = [NetworkFilters(backend, *one) for one in rates.items()]
    machines = [(both[n % 2], f"dispatcher-aaaa000{n % 2 + 1}-m{n}") for n in range(29)]

    def claim(machine):
        return str(machine[0].claim(name, machine[1], (), Deadline(60)).address.ip)

    vm.virsh("net-define", str(path))
    try:
        with ThreadPoolExecutor(6) as pool:
            given = list(pool.map(claim, machines))
        assert sorted(given, key=ip_address) == [f"192.168.236.{n}" for n in range(2, 31)]
        vm.virsh("net-destroy", name)
        with pytest.raises(ProviderError, match=r"No address of 192\.168\.236\.0/27 is free"):
            claim((both[0], "dispatcher-aaaa0001-late"))
        restarted = NetworkFilters(backend, "aaaa0002", rates["aaaa0002"])
        assert claim((restarted, machines[3][1])) == given[3], "also after a restart of the manager"
        vm.virsh("net-destroy", name)
        for filters, machine in machines:
            filters.release(name, machine, Deadline(60))
        assert "aaaa000" not in vm.virsh("net-dumpxml", name) + vm.virsh("nwfilter-list")
        assert not vm.leftovers("aaaa0001") | vm.leftovers("aaaa0002")
    finally:
        path.unlink()
        backend.close()
        vm.virsh("net-destroy", name)
        vm.virsh("net-undefine", name)


def test_usage_and_list_cost_a_few_calls_however_many_there_are(world):
    world.probe("alice")
    calls = []
    call = world.provider._backend.call
    world.provider._backend.call = lambda function, **named: calls.append(named["what"]) or call(function, **named)
    handles = [replace(world.handles["alice"], name=f"dispatcher-x-{n}") for n in range(100)]
    found = world.provider.usage([world.handles["alice"], *handles], deadline=Deadline(10))
    assert list(found) == [world.handles["alice"].name]
    assert len(list(world.provider.list(deadline=Deadline(10)))) == 1
    assert len(calls) == 2


def test_limits_reach_qemu(world, private_network):
    world.restart_provider(network=private_network)
    limits = {"balloon": "128M", "vcpus": 2, "cpu_shares": 512, "disk_bandwidth": "20M", "disk_iops": 500}
    # Whether the kernel has what libvirt limits networks with.
    can = subprocess.run(["unshare", "-n", "tc", "qdisc", "add", "dev", "lo", "root", "sfq"], capture_output=True)
    able = can.returncode == 0

    def spec(**more):
        options = vm.app_options(**limits, **more)
        return world.spec("alice", network=Network.PRIVATE, limits=Limits(memory=192 << 20, cpus=1.5), **options)

    if not able:
        with pytest.raises(ProviderError, match="cannot limit a network's bandwidth") as caught:
            world.ensure(spec(network_bandwidth="1M"))
        assert "network_bandwidth" in caught.value.fix
        assert vm.leftovers(world.installation, world.root) == set()
    handle = world.ensure(spec(network_bandwidth="1M") if able else spec())
    inside = world.inside(handle)
    name = handle.name

    def said(*command):
        pairs = (re.split(r"\s*:\s*|\s+", line.strip(), maxsplit=1) for line in vm.virsh(*command).splitlines())
        return dict(pair for pair in pairs if len(pair) == 2)

    assert vm.virsh("vcpucount", name, "--live").strip() == "2"
    for disk in ("vda", "vdb"):
        tuned = said("blkdeviotune", name, disk, "--live")
        assert (tuned["total_bytes_sec"], tuned["total_iops_sec"]) == (str(20 << 20), "500")
    assert said("dommemstat", name)["actual"] == str(128 << 10)
    if Capability.CPU_LIMIT in world.provider.capabilities:
        tuned = said("schedinfo", name, "--live")
        assert (tuned["cpu_shares"], tuned["global_period"], tuned["global_quota"]) == ("512", "100000", "150000")
    if able:
        (interface,) = (line.split()[0] for line in vm.virsh("domiflist", name).splitlines() if line.strip())
        tuned = said("domiftune", name, interface, "--live")
        assert tuned["inbound.average"] == tuned["outbound.average"] == "1024"
        began = time.monotonic()
        inside.write("/data/large", bytes(3 << 20))
        assert time.monotonic() - began > 1.5, "three MiB at one a second"
