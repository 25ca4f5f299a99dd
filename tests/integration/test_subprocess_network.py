"""Networks of agents: private reaches the outside and nothing of this host; a port is the agent's own or nobody's.

The private networks live in namespaces that the test makes: one is "this host", one is "the outside".
"""

import json
import os
import re
import selectors
import socket
import subprocess
import sys
import textwrap
from ipaddress import ip_network
from pathlib import Path

import pytest
from dispatcher_subprocess import explain, network
from dispatcher_subprocess.host import Host

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.model import BackendState, Capability, Network
from dispatcher.testing import PROBE
from tests.support.subprocess_world import PYTHON, World, destroy, eventually, observe

TCP = [PYTHON, "-S", str(PROBE), "--tcp", "127.0.0.1:{port}"]
HERE = Path(__file__).parent.parent.parent


@pytest.fixture
def world():
    made = World("7e570040")
    yield made
    made.close()


@pytest.mark.bubblewrap
def test_a_port_without_a_network_is_refused_in_words(world):
    provider = world.provider()
    with pytest.raises(ConfigError) as caught:
        world.start(provider, world.spec("alice", TCP), ready=False)
    assert "{port}" in str(caught.value) and "{socket}" in caught.value.fix


def test_a_port_is_told_once_the_agent_listens_there(world):
    provider = world.provider()
    spec = world.spec("alice", TCP, network=Network.HOST)
    handle, inside = world.start(provider, spec)
    seen = observe(provider, handle)
    assert seen.endpoint.kind == "tcp" and seen.endpoint.host == "127.0.0.1"
    assert 20000 <= seen.endpoint.port <= 29999
    other, _ = world.start(provider, world.spec("bob", TCP, network=Network.HOST))
    assert observe(provider, other).endpoint != seen.endpoint
    assert observe(world.provider(), handle).endpoint == seen.endpoint, "a fresh manager finds it too"


def test_a_stolen_port_is_not_used(world):
    """Somebody else listens on the agent's port: the endpoint is withheld, and the reason told."""
    provider = world.provider()
    program = "import sys, time\nprint('port', sys.argv[1], flush=True)\ntime.sleep(60)\n"
    spec = world.spec("alice", [PYTHON, "-S", "-c", program, "{port}"], network=Network.HOST)
    handle, _ = world.start(provider, spec, ready=False)
    seen = observe(provider, handle)
    assert seen.state is BackendState.RUNNING and seen.endpoint is None
    assert seen.detail == "it does not listen yet"
    told = eventually(lambda: list(provider.logs(handle, tail=1, follow=False, deadline=Deadline(1))))
    port = int(told[0].split()[1])
    for address in (("127.0.0.1", port), ("0.0.0.0", port)):
        with socket.create_server(address):
            seen = observe(provider, handle)
            assert seen.endpoint is None
            assert "another process" in seen.detail
            (listed,) = [found for _, found in provider.list(deadline=Deadline(5))]
            assert listed.endpoint is None


def test_ports_in_use_are_not_given_out(world):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        world.options = {"ports": (port, port)}
        provider = world.provider()
        with pytest.raises(Exception, match="No TCP port is free"):
            world.start(provider, world.spec("alice", TCP, network=Network.HOST), ready=False)
    handle, _ = world.start(provider, world.spec("alice", TCP, network=Network.HOST))
    assert observe(provider, handle).endpoint.port == port
    with pytest.raises(Exception, match="No TCP port is free"):
        world.start(provider, world.spec("bob", TCP, network=Network.HOST), ready=False)
    destroy(provider, handle)


def flood(server):
    """Send as much as each client's side takes."""
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    clients = []
    while True:
        with selectors.DefaultSelector() as ready:
            for sock in (server, *clients):
                ready.register(sock, selectors.EVENT_READ if sock is server else selectors.EVENT_WRITE)
            found = [key.fileobj for key, _ in ready.select()]
        for sock in found:
            if sock is server:
                clients.append(server.accept()[0])
                clients[-1].setblocking(False)
            else:
                try:
                    sock.send(bytes(65536))
                except BlockingIOError:
                    pass
                except OSError:
                    clients.remove(sock)


SETUP = textwrap.dedent(
    """
    set -e
    mount -t tmpfs tmpfs /mnt
    cp -a /etc /mnt/etc
    rm /mnt/etc/resolv.conf
    printf 'nameserver 203.0.113.53\\nsearch example.org\\n' > /mnt/etc/resolv.conf
    mount --bind /mnt/etc /etc
    # As later versions do, this pasta closes the descriptors that it inherits.
    real=$(realpath /usr/bin/pasta)
    cp $real /mnt/real-pasta
    printf '#!/usr/bin/python3 -IS\nimport os, signal, sys\nos.closerange(3, 4096)\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\nos.execv("/mnt/real-pasta", sys.argv)\n' > /mnt/pasta
    chmod 755 /mnt/pasta
    mount --bind /mnt/pasta $real
    ip link set lo up
    unshare -n sleep 120 & outside=$!
    trap 'kill $outside $! 2>/dev/null || true' EXIT
    sleep 0.2
    ip link add ext type veth peer name out netns $outside
    ip addr add 10.9.0.2/24 dev ext
    ip addr add 10.9.0.3/24 dev ext
    ip link set ext up
    ip link add inner type bridge
    ip addr add 172.20.0.1/16 dev inner
    ip link set inner up
    nsenter -t $outside -n sh -c 'ip link set lo up; ip addr add 10.9.0.1/24 dev out; ip link set out up;
        ip addr add 203.0.113.5/32 dev lo; ip addr add 203.0.113.53/32 dev lo; ip addr add 169.254.169.254/32 dev lo;
        ip addr add 168.63.129.16/32 dev lo; ip addr add 100.100.100.200/32 dev lo; ip addr add fd00:ec2::254/128 dev lo;
        ip addr add 2001:db8:5::5/128 dev lo; ip addr add 2001:db8:5::53/128 dev lo nodad; ip addr add 2001:db8:9::1/64 dev out nodad;
        ip addr add fe80::a9fe:a9fe/64 dev out nodad'
    ip addr add 2001:db8:9::2/64 dev ext nodad
    ip route add default via 10.9.0.1
    ip -6 route add default via 2001:db8:9::1
    nsenter -t $outside -n "$PYTHON" -c "$SERVE" &
    until (exec 3<>/dev/tcp/203.0.113.5/80) 2>/dev/null; do sleep 0.1; done
    "$PYTHON" -c "$INSIDE" "$@"
    """
)
SERVE = textwrap.dedent(
    """
    import asyncio, resource, socket, threading
    from tests.integration.test_subprocess_network import flood
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    from tests.support.outside import serve_names
    serve_names("203.0.113.53", 5)
    serve_names("2001:db8:5::53", 7)
    threading.Thread(target=flood, args=(socket.create_server(("203.0.113.5", 81), backlog=64),)).start()
    async def keep(reader, writer):
        await reader.read()
        writer.close()

    async def keeping():
        await (await asyncio.start_server(keep, "203.0.113.5", 82, backlog=4096)).serve_forever()

    threading.Thread(target=lambda: asyncio.run(keeping()), daemon=True).start()
    server = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        server.accept()[0].close()
    """
)
INSIDE = textwrap.dedent(
    """
    import json, socket, sys, threading
    from dispatcher.plugin.model import Network
    from tests.integration.test_subprocess_network import ASK, BYPASS, TCP
    from tests.support.subprocess_world import PYTHON, World, destroy, observe

    carrier, kind = sys.argv[1:3]
    servers = [socket.create_server(("0.0.0.0", 8000))]
    heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    heard.bind(("0.0.0.0", 8001))
    heard.settimeout(0.5)
    heard6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    heard6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    heard6.bind(("::", 8001))
    heard6.settimeout(0.5)
    world = World("7e570041", private_network=carrier)
    provider = world.provider()
    report = {}
    try:
        spec = world.spec("alice", TCP if kind == "tcp" else None, network=Network.PRIVATE)
        handle, inside = world.start(provider, spec)
        for address in ("203.0.113.5:80", "10.9.0.2:8000", "10.9.0.3:8000", "172.20.0.1:8000", "172.20.0.9:80",
                        "127.0.0.1:8000", "10.9.0.1:8000", "169.254.169.254:80", "168.63.129.16:80",
                        "100.100.100.200:80", "[2001:db8:5::5]:80", "[fd00:ec2::254]:80", "[fe80::a9fe:a9fe%2]:80"):
            report[address] = inside.refused("/connect", to="tcp:" + address) or "reached"
        bypass = world.spec("carol", [PYTHON, "-S", "-c", BYPASS, "{socket}"], network=Network.PRIVATE)
        world.start(provider, bypass, ready=False)
        report["by interface"] = "nothing was tried"
        for _ in range(3000):
            import time
            time.sleep(0.01)
            if (bypass.data_dir / "reached").exists():
                report["by interface"] = (bypass.data_dir / "reached").read_text()
                break
        report["resolv"] = inside.read("/etc/resolv.conf").decode()
        report["datagrams"] = []
        for sock in (heard, heard6):
            try:
                while True:
                    report["datagrams"].append(sock.recv(100).decode())
            except TimeoutError:
                pass
        tables = bypass.data_dir / "neighbours"
        report["neighbours"] = tables.read_text() if tables.exists() else "nothing was tried"
        name = world.spec("bob", [PYTHON, "-S", "-c", ASK, "{socket}"], network=Network.PRIVATE)
        world.start(provider, name, ready=False)
        report["name"] = ""
        for _ in range(500):
            import time
            time.sleep(0.01)
            if (name.data_dir / "address").exists():
                report["name"] = (name.data_dir / "address").read_text()
                break
        record = provider._journals.read(handle.name)
        report["helper"] = [record.helper.pid, record.helper.start]
        if kind == "tcp":
            endpoint = observe(provider, handle).endpoint
            report["port"] = endpoint.port
        destroy(provider, handle)
        report["helper lives"] = record.helper.lives
    finally:
        world.close()
    print("REPORT", json.dumps(report))
    """
)
#: Names the interface in each way that the kernel has, TCP and UDP; writes what was reached.
BYPASS = textwrap.dedent(
    """
    import os, socket, struct, sys
    (index,) = [number for number, name in socket.if_nameindex() if name != "lo"]
    device = socket.if_indextoname(index).encode()
    reached = []

    def bound(sock, how):
        if how == "SO_BINDTODEVICE":
            sock.setsockopt(socket.SOL_SOCKET, 25, device)
        elif how == "UNICAST_IF" and sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, 50, struct.pack("!I", index))
        elif how == "UNICAST_IF":
            sock.setsockopt(socket.IPPROTO_IPV6, 76, struct.pack("!I", index))

    for address in ("203.0.113.5", "169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254",
                    "10.9.0.2", "10.9.0.3", "172.20.0.1", "172.20.0.9", "127.0.0.1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for how in ("SO_BINDTODEVICE", "UNICAST_IF", "PKTINFO"):
            with socket.socket(family) as tcp, socket.socket(family, socket.SOCK_DGRAM) as udp:
                tcp.settimeout(0.4)
                try:
                    bound(tcp, how)
                    tcp.connect((address, 8000 if address.startswith(("10.", "172.", "127.")) else 80))
                    tcp.recv(1)
                    reached.append(address + " " + how)
                except OSError:
                    pass
                try:
                    bound(udp, how)
                    info = struct.pack("@iII", index, 0, 0)
                    extra = [(socket.IPPROTO_IP, 8, info)] if how == "PKTINFO" and family == socket.AF_INET else []
                    udp.sendmsg([f"{address} {how}".encode()], extra, 0, (address, 8001))
                except OSError:
                    pass
    # Multicast and broadcast, with and without an interface.
    own = socket.create_connection(("203.0.113.5", 80))
    source = socket.inet_aton(own.getsockname()[0])
    for address in ("224.0.0.1", "239.1.2.3", "255.255.255.255", "10.9.0.255", "ff02::1", "ff05::1", "ff0e::1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for how in ("", "SO_BINDTODEVICE", "UNICAST_IF", "PKTINFO", "MULTICAST_IF", "bind"):
            with socket.socket(family, socket.SOCK_DGRAM) as udp:
                extra = []
                to = (address, 8001, 0, index) if family == socket.AF_INET6 else (address, 8001)
                try:
                    if family == socket.AF_INET:
                        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                        if how == "MULTICAST_IF":
                            udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, source)
                        elif how == "bind":
                            udp.bind((socket.inet_ntoa(source), 0))
                        elif how == "PKTINFO":
                            extra = [(socket.IPPROTO_IP, 8, struct.pack("@iII", index, 0, 0))]
                    elif how == "MULTICAST_IF":
                        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
                    elif how == "PKTINFO":
                        extra = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, bytes(16) + struct.pack("@I", index))]
                    bound(udp, how)
                    udp.sendmsg([f"{address} {how}".encode()], extra, 0, to)
                except OSError:
                    pass
    # Each address that is a neighbour takes an entry of a table that all namespaces share.
    for number in range(1, 101):
        for address in (f"10.9.0.{number}", f"10.0.2.{number}", f"2001:db8:9::aa:{number}", f"ff05::{number}",
                        f"fe80::{number}", f"fd00:ec2::{number}", f"169.254.7.{number}", f"224.0.0.{number}"):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for how in ("", "SO_BINDTODEVICE"):
                for flags in (0, socket.MSG_DONTROUTE):
                    with socket.socket(family, socket.SOCK_DGRAM) as udp:
                        try:
                            bound(udp, how)
                            udp.sendto(b"x", flags, (address, 9, 0, index) if ":" in address else (address, 9))
                        except OSError:
                            pass
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    netlink.bind((0, 0))
    netlink.send(struct.pack("=IHHII B3xiHBB", 28, 30, 0x301, 1, 0, 0, 0, 0, 0, 0))  # RTM_GETNEIGH, dump
    count, done = 0, False
    while not done:
        data = netlink.recv(65536)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            done = done or kind == 3
            count += kind == 28
            data = data[(length + 3) & ~3 :]
    open("/data/neighbours", "w").write(str(count))
    open("/data/reached.new", "w").write(" ".join(reached))
    os.rename("/data/reached.new", "/data/reached")
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    while True:
        server.accept()[0].close()
    """
)
ASK = (
    "import os, socket, sys\n"
    "try:\n    found = socket.gethostbyname('some.example.net')\n"
    "except OSError as error:\n    found = str(error)\n"
    "open('/data/address.new', 'w').write(found)\n"
    "os.rename('/data/address.new', '/data/address')\n"
    "server = socket.socket(socket.AF_UNIX)\nserver.bind(sys.argv[1])\nserver.listen()\n"
    "while True:\n    server.accept()[0].close()\n"
)


RESOLVE = textwrap.dedent(
    """
    import os, pwd, socket, sys
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    print("the log collector opens its file", flush=True)
    QUERY = b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4some\\0\\0\\1\\0\\1"
    while True:
        client = server.accept()[0]
        try:
            how = client.recv(9)
            if how == b"user":
                found = pwd.getpwuid(os.getuid()).pw_name
            elif how == b"tcp":
                sock = socket.create_connection(("127.0.0.1", 53), 5)
                sock.sendall(len(QUERY).to_bytes(2, "big") + QUERY)
                found = socket.inet_ntoa(sock.recv(512)[-4:])
            else:
                found = socket.gethostbyname("some.example.net")
        except OSError as error:
            found = repr(error)
        client.sendall(found.encode())
        client.close()
    """
)
MOVING = textwrap.dedent(
    """
    import json, os, signal, socket, subprocess, time
    from pathlib import Path
    from dispatcher.plugin import Deadline, Depth, Network, no_progress
    from tests.integration.test_subprocess_logs import collector_of
    from tests.integration.test_subprocess_network import RESOLVE
    from tests.support.outside import serve_names
    from tests.support.subprocess_world import PYTHON, ROOT, World, eventually

    def ask(spec, how="udp"):
        with socket.socket(socket.AF_UNIX) as sock:
            while sock.connect_ex(str(spec.socket)):
                time.sleep(0.01)
            sock.settimeout(20)
            sock.sendall(how.encode())
            return sock.recv(100).decode()

    def replace(name, text):
        Path(f"/etc/{name}.new").write_text(text)
        os.rename(f"/etc/{name}.new", f"/etc/{name}")

    world = World("7e570042")
    provider = world.provider()
    provider.watch(lambda name: None)
    report = {}
    try:
        spec = world.spec("alice", [PYTHON, "-S", "-c", RESOLVE, "{socket}"], network=Network.PRIVATE)
        handle, _ = world.start(provider, spec, ready=False)
        report["at first"] = ask(spec)
        if ROOT:
            serve_names("127.0.0.53", 6)
            replace("resolv.conf", "nameserver 127.0.0.53\\n")
            report["a service of the host"] = ask(spec)
            replace("passwd", Path("/etc/passwd").read_text())
            report["its user"] = ask(spec, "user")
        report["over TCP"] = ask(spec, "tcp")
        provider.suspend(handle, depth=Depth.RAM, deadline=Deadline(10), progress=no_progress)
        replace("resolv.conf", "nameserver 203.0.113.99\\nnameserver 203.0.113.53\\n")
        time.sleep(2)
        provider.resume(handle, deadline=Deadline(10), progress=no_progress)
        report["the second server, after a sleep"] = ask(spec)
        os.kill(eventually(lambda: collector_of(world)), signal.SIGKILL)
        time.sleep(1)
        report["a new collector"] = ask(spec)
        if ROOT:
            steps = ("addr flush dev ext scope global", "-6 addr add 2001:db8:9::2/64 dev ext nodad",
                     "-6 route replace default via 2001:db8:9::1", "-4 route flush all")
            for step in steps:
                subprocess.run(["ip", *step.split()], check=True)
        replace("resolv.conf", "nameserver 2001:db8:5::53\\n")
        report["IPv6"] = ask(spec)
        late = world.spec("bob", [PYTHON, "-S", "-c", RESOLVE, "{socket}"], network=Network.PRIVATE)
        world.start(provider, late, ready=False)
        report["a start with IPv6 alone"] = ask(late)
    finally:
        world.close()
    print("REPORT", json.dumps(report))
    """
)


PORT = textwrap.dedent(
    """
    import json
    from dispatcher.plugin.model import Network
    from tests.integration.test_subprocess_network import TCP
    from tests.support.subprocess_world import World, observe
    world = World("7e570043", private_network="pasta")
    provider = world.provider()
    try:
        handle, _ = world.start(provider, world.spec("alice", TCP, network=Network.PRIVATE))
        endpoint = str(observe(provider, handle).endpoint)
        told = [one.what for one in provider.explain(None) if "tracked connections" in one.what]
        later = str(observe(world.provider(), handle).endpoint)
        print("REPORT", json.dumps({"endpoint": endpoint, "later": later, "told": told}))
    finally:
        world.close()
    """
)


#: Opens connections and reads nothing.
UNREAD = textwrap.dedent(
    """
    import os, socket, sys
    kept = []
    for _ in range(40):
        kept.append(socket.socket())
        kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        kept[-1].connect(("203.0.113.5", 81))
    os.mkdir("/data/connected")
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    while True:
        server.accept()[0].close()
    """
)
BUFFERS = textwrap.dedent(
    """
    import json, re, subprocess, sys, time
    from dispatcher.plugin import Limits, Network
    from tests.integration.test_subprocess_network import UNREAD
    from tests.support.subprocess_world import PYTHON, World, eventually

    world = World("7e570045", private_network=sys.argv[1])
    provider = world.provider()
    try:
        spec = world.spec("alice", [PYTHON, "-S", "-c", UNREAD, "{socket}"], network=Network.PRIVATE,
                          limits=Limits(memory=64 << 20, swap=0))
        world.start(provider, spec, ready=False)
        eventually((spec.data_dir / "connected").exists)
        most = 0
        for _ in range(40):
            time.sleep(0.1)
            told = subprocess.run(["ss", "-tmnH", "dst", "203.0.113.5"], capture_output=True, text=True).stdout
            sizes = [int(size) for size in re.findall(r"skmem:[(]r([0-9]+)", told)]
            most = max(most, sum(sizes))
        print("REPORT", json.dumps({"sockets": len(sizes), "bytes": most}))
    finally:
        world.close()
    """
)


#: Opens all the connections that it can.
MANY = textwrap.dedent(
    """
    import os, socket, sys, time
    kept, refused = [], 0
    while len(kept) < 6000:
        kept.append(socket.socket())
        kept[-1].setblocking(False)
        kept[-1].connect_ex(("203.0.113.5", 82))
        if len(kept) % 50 == 0:
            time.sleep(0.02)
    time.sleep(3)
    os.mkdir("/data/connected")
    while not os.path.exists("/data/counted"):
        time.sleep(0.1)
    for sock in kept:
        sock.close()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            socket.create_connection(("203.0.113.5", 80), 3).close()
            os.mkdir("/data/again")
            break
        except OSError:
            time.sleep(0.1)
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    while True:
        server.accept()[0].close()
    """
)
CROWD = textwrap.dedent(
    """
    import json, subprocess, sys
    from dispatcher.plugin.model import Network
    from tests.integration.test_subprocess_network import MANY
    from tests.support.subprocess_world import PYTHON, World, eventually

    world = World("7e570048", private_network=sys.argv[1])
    provider = world.provider()
    try:
        spec = world.spec("alice", [PYTHON, "-S", "-c", MANY, "{socket}"], network=Network.PRIVATE)
        world.start(provider, spec, ready=False)
        eventually((spec.data_dir / "connected").exists, 60)
        told = subprocess.run(["ss", "-tanH", "dst", "203.0.113.5"], capture_output=True, text=True).stdout
        (spec.data_dir / "counted").mkdir()
        eventually((spec.data_dir / "again").exists, 60)
        print("REPORT", json.dumps(len(told.splitlines())))
    finally:
        world.close()
    """
)


#: Opens a hundred connections at once; then makes and ends as many as it can, flows of datagrams and DNS queries, too.
FLEETING = textwrap.dedent(
    """
    import os, select, socket, sys, threading, time
    begin = time.monotonic()
    first = [socket.create_connection(("203.0.113.5", 82), 5) for _ in range(100)]
    took = time.monotonic() - begin
    question = bytes.fromhex("00070100000100000000000001780000010001")
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.connect(("127.0.0.1", 53))

    def attempt(address, data=b""):
        try:
            with socket.create_connection(address, 0.02) as sock:
                sock.sendall(data)
                sock.recv(1)
        except OSError:
            pass

    def datagrams():
        for port in range(2000, 2100):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                try:
                    other.sendto(b"x", ("203.0.113.5", port))
                except OSError:
                    pass
        time.sleep(0.01)

    def ask():
        udp.send(question)
        if select.select([udp], [], [], 0.005)[0]:
            udp.recv(512)

    def keep_on(what, *arguments):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            what(*arguments)

    jobs = [(attempt, ("203.0.113.5", 80)), (datagrams,), (ask,)]
    jobs.append((attempt, ("127.0.0.1", 53), len(question).to_bytes(2, "big") + question))
    threads = [threading.Thread(target=keep_on, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    open("/data/took.new", "w").write(str(took))
    os.rename("/data/took.new", "/data/took")
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    while True:
        server.accept()[0].close()
    """
)
TRACKED = textwrap.dedent(
    """
    import json, subprocess, sys
    from collections import Counter
    from pathlib import Path
    from dispatcher.plugin.model import Network
    from tests.integration.test_subprocess_network import FLEETING
    from tests.support.subprocess_world import PYTHON, World, eventually

    rules = "table inet tracks { chain out { type filter hook output priority filter; ct state new accept; }; }"
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    world = World("7e570049", private_network=sys.argv[1])
    provider = world.provider()
    try:
        spec = world.spec("alice", [PYTHON, "-S", "-c", FLEETING, "{socket}"], network=Network.PRIVATE)
        world.start(provider, spec, ready=False)
        eventually((spec.data_dir / "took").exists, 60)
        found = Counter()
        for line in Path("/proc/net/nf_conntrack").read_text().splitlines():
            words = line.partition(" src=")
            (kind,) = {"tcp", "udp"} & set(words[0].split()) or {"other"}
            found["names" if " dport=53 " in words[2] else kind] += "dst=203.0.113.5" in words[2]
        told = [one.what for one in provider.explain(None) if "tracked connections" in one.what]
        took = float((spec.data_dir / "took").read_text())
        print("REPORT", json.dumps({"entries": found, "told": told, "the first hundred": took}))
    finally:
        world.close()
    """
)


#: Sends datagrams from ports of its choice, in each way that the kernel has; writes what it received there.
DATAGRAMS = textwrap.dedent(
    """
    import os, select, socket, struct, sys, time
    device, index = b"eth0", socket.if_nametoindex("eth0")
    OUT = {socket.AF_INET: "203.0.113.5", socket.AF_INET6: "2001:db8:5::5"}
    socks, notes, port = [], [], 5990
    for family, host in OUT.items():
        ip = socket.IPPROTO_IP if family == socket.AF_INET else socket.IPPROTO_IPV6
        for how in ("", "connect", "device", "unicast", "info", "policy", "dontroute", "mapped", "tos", "udplite"):
            try:
                kind = socket.AF_INET6 if how == "mapped" else family
                sock = socket.socket(kind, socket.SOCK_DGRAM, 136 if how == "udplite" else 0)
                to = "::ffff:" + OUT[socket.AF_INET] if how == "mapped" else host
                if kind == socket.AF_INET6 and how != "mapped":
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(("", port))
                socks.append(sock)
                port += 1
                extra, flags = [], 0
                if how == "connect":
                    sock.connect((to, 9))
                elif how == "device":
                    sock.setsockopt(socket.SOL_SOCKET, 25, device)
                elif how == "unicast":
                    sock.setsockopt(ip, 50 if ip == 0 else 76, struct.pack("!I", index))
                elif how == "info" and ip == 0:
                    extra = [(ip, 8, struct.pack("@iII", index, 0, 0))]
                elif how == "info":
                    extra = [(ip, socket.IPV6_PKTINFO, bytes(16) + struct.pack("@I", index))]
                elif how == "policy":  # a policy of its own: allow
                    policy = bytearray(168)
                    struct.pack_into("=H", policy, 40, family)
                    policy[160] = 1  # XFRM_POLICY_OUT
                    sock.setsockopt(ip, 17 if ip == 0 else 35, bytes(policy))
                elif how == "dontroute":
                    flags = socket.MSG_DONTROUTE
                sock.sendmsg([b"from the agent"], extra, flags, None if how == "connect" else (to, 9))
                notes.append(f"sent:{family.name}:{how}")
            except OSError as error:
                pass
        try:
            ping = socket.socket(family, socket.SOCK_DGRAM, 1 if ip == 0 else 58)
            ping.sendto(bytes([8 if ip == 0 else 128, 0, 0, 0, 0, 7, 0, 1]), (host, 0))
            notes.append("ping")
        except OSError:
            pass
        # Within the agent's own network it may do what it likes.
        own = "127.0.0.1" if ip == 0 else "::1"
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind((own, 0))
            one.settimeout(5)
            with socket.socket(family, socket.SOCK_DGRAM) as other:
                other.sendto(b"x", one.getsockname())
            notes.append("own:" + one.recv(9).decode())
    os.mkdir("/data/sent")
    end = time.monotonic() + 60
    while time.monotonic() < end and not os.path.exists("/data/asked"):
        for sock in select.select(socks, [], [], 0.2)[0]:
            try:
                notes.append("stole:" + sock.recv(99).decode().replace(" ", "_"))
            except OSError:
                pass
    open("/data/notes.new", "w").write(" ".join(notes))
    os.rename("/data/notes.new", "/data/notes")
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    while True:
        server.accept()[0].close()
    """
)
THEFT = textwrap.dedent(
    """
    import json, socket, subprocess, sys, time
    from dispatcher.plugin.model import Network
    from tests.integration.test_subprocess_network import DATAGRAMS
    from tests.support.subprocess_world import PYTHON, World, eventually

    services = []
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for port in range(5990, 6010):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            sock.settimeout(0.2)
            services.append(sock)
    sockets = lambda: subprocess.run(["ss", "-uanH"], capture_output=True, text=True).stdout.splitlines()
    before = len(sockets())
    world = World("7e570047", private_network=sys.argv[1])
    provider = world.provider()
    report = {}
    try:
        spec = world.spec("alice", [PYTHON, "-S", "-c", DATAGRAMS, "{socket}"], network=Network.PRIVATE)
        world.start(provider, spec, ready=False)
        eventually((spec.data_dir / "sent").exists)
        time.sleep(1)
        report["more sockets"] = len(sockets()) - before
        stranger = "import socket; s = {4: socket.socket(2, 2), 6: socket.socket(10, 2)}"
        stranger += "; [s[v].sendto(b'to the service', (a, p)) for p in range(5990, 6010) for v, a in "
        local = stranger + "((4, '127.0.0.1'), (4, '10.9.0.2'), (6, '::1'), (6, '2001:db8:9::2'))]"
        for _ in range(3):
            subprocess.run([sys.executable, "-c", local], check=True)
        received = 0
        for sock in services:
            try:
                while True:
                    sock.recv(99)
                    received += 1
                    sock.settimeout(0.05)
            except TimeoutError:
                pass
        report["received"] = received
        (spec.data_dir / "asked").mkdir()
        eventually((spec.data_dir / "notes").exists)
        report["notes"] = (spec.data_dir / "notes").read_text().split()
    finally:
        world.close()
    print("REPORT", json.dumps(report))
    """
)


#: The host's mounts are shared, as systemd's are: what a program unmounts in a copy of them goes in all.
MOUNTS = textwrap.dedent(
    """
    import json, subprocess, sys
    from pathlib import Path
    from dispatcher.plugin.model import Network
    from tests.support.subprocess_world import World, destroy

    mounted = lambda: sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    for step in ("mount --make-rshared /", "mkdir /mnt/user", "mount -t tmpfs tmpfs /mnt/user"):
        subprocess.run(step.split(), check=True)
    world = World("7e570046", private_network=sys.argv[1])
    provider = world.provider()
    before, report = mounted(), {}
    try:
        handle, _ = world.start(provider, world.spec("alice", None, network=Network.PRIVATE))
        report["while it runs"] = [one for one in before if one not in mounted()]
        destroy(provider, handle)
    finally:
        world.close()
    report["afterwards"] = [one for one in before if one not in mounted()]
    print("REPORT", json.dumps(report))
    """
)


#: A host that has no network yet, and then a default route without a gateway, as of a tunnel or of rented servers.
ROUTES = textwrap.dedent(
    """
    import json, socket, subprocess
    from dispatcher.plugin.errors import Unavailable
    from dispatcher.plugin.model import Network
    from tests.support.subprocess_world import World

    server = socket.create_server(("0.0.0.0", 8000))
    world = World("7e570045", private_network="pasta")
    provider = world.provider()
    ip = lambda words: subprocess.run(["ip", *words.split()], check=True)
    report = {}
    try:
        ip("route del default")
        ip("-6 route del default")
        try:
            world.start(provider, world.spec("alice", network=Network.PRIVATE), ready=False)
        except Unavailable as error:
            report["without a network"] = error.why
        ip("route add default dev ext scope link")
        handle, inside = world.start(provider, world.spec("alice", network=Network.PRIVATE))
        for address in ("203.0.113.5:80", "10.9.0.2:8000", "10.9.0.3:8000", "172.20.0.1:8000", "127.0.0.1:8000"):
            report[address] = inside.refused("/connect", to="tcp:" + address) or "reached"
        print("REPORT", json.dumps(report))
    finally:
        world.close()
    """
)


#: Runs a program of this module as an ordinary user who may change /etc, which is a copy.
AS_USER = textwrap.dedent(
    """
    import os, stat, subprocess, sys
    from tests.integration import test_subprocess_network
    from tests.integration.test_subprocess_user import OPEN_UP, private_prefixes
    os.chmod("/etc", 0o777)
    os.mknod("/mnt/tun", stat.S_IFCHR, os.makedev(10, 200))
    os.chmod("/mnt/tun", 0o666)
    subprocess.run(["mount", "--bind", "/mnt/tun", "/dev/net/tun"], check=True)
    prefixes = private_prefixes()
    os.execvp("sh", ["sh", "-c", OPEN_UP, "sh", *prefixes, "--", sys.executable, "-c",
                       getattr(test_subprocess_network, sys.argv[1])])
    """
)


def in_namespaces(*arguments, program=INSIDE):
    """Run a manager on a "host" of its own; return what its agents could reach."""
    done = subprocess.run(
        ["unshare", "--net", "--mount", "bash", "-c", SETUP, "bash", *arguments],
        env=os.environ | {"PYTHON": sys.executable, "SERVE": SERVE, "INSIDE": program, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=90,
        cwd=HERE,
    )
    found = re.search(r"^REPORT (.*)$", done.stdout, re.M)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(found[1])


@pytest.mark.root
@pytest.mark.bubblewrap
@pytest.mark.parametrize("carrier, kind", [("pasta", "unix"), ("slirp4netns", "unix"), ("pasta", "tcp")])
def test_a_private_network_reaches_the_outside_and_nothing_of_this_host(carrier, kind):
    report = in_namespaces(carrier, kind)
    assert report["203.0.113.5:80"] == "reached"
    assert report["[2001:db8:5::5]:80"] == "reached" or carrier == "slirp4netns", "IPv6 where the carrier has it"
    for address in (
        "10.9.0.2:8000",  # this host's address
        "10.9.0.3:8000",  # its second one
        "172.20.0.1:8000",  # its address in a network of containers
        "172.20.0.9:80",  # another machine in such a network
        "127.0.0.1:8000",  # the loopback interface: the agent has its own
        "10.9.0.1:8000",  # the gateway, which carriers like to map to the host
        "169.254.169.254:80",  # clouds' metadata
        "168.63.129.16:80",
        "100.100.100.200:80",
        "[fd00:ec2::254]:80",
        "[fe80::a9fe:a9fe%2]:80",
    ):
        assert report[address] not in {"reached", ""}, address
    assert set(report["by interface"].split()) == {"203.0.113.5", "SO_BINDTODEVICE", "UNICAST_IF", "PKTINFO"}
    assert report["datagrams"] == [], "also by multicast and broadcast"
    assert int(report["neighbours"]) < 10, "the gateway, and few of the kernel's own"
    assert "search example.org" in report["resolv"]
    assert "203.0.113.53" not in report["resolv"]
    assert report["name"] == "203.0.113.5", "names are resolved"
    assert report["helper lives"] is False
    if kind == "tcp":
        assert 20000 <= report["port"] <= 29999


@pytest.mark.root
@pytest.mark.bubblewrap
@pytest.mark.parametrize("carrier", ["pasta", "slirp4netns"])
def test_a_private_network_unmounts_nothing_of_the_host(carrier):
    assert in_namespaces(carrier, program=MOUNTS) == {"while it runs": [], "afterwards": []}


@pytest.mark.root
@pytest.mark.bubblewrap
@pytest.mark.parametrize("carrier", ["pasta", "slirp4netns"])
def test_an_agent_gets_no_datagrams_of_the_host(carrier):
    """pasta would bind each port that an agent sends from on this host, beside a service with SO_REUSEADDR."""
    report = in_namespaces(carrier, program=THEFT)
    assert report["received"] == 3 * 4 * 20, "the host's services get theirs"
    notes = report["notes"]
    assert [note for note in notes if note.startswith("stole") or note == "ping"] == []
    assert notes.count("own:x") == 2
    if carrier == "pasta":
        assert "sent:AF_INET:" not in notes and "sent:AF_INET6:" not in notes, "an error tells the app"
        assert report["more sockets"] == 0, "whatever an agent sends, and how"


@pytest.mark.root
@pytest.mark.bubblewrap
@pytest.mark.parametrize("carrier", ["pasta", "slirp4netns"])
def test_an_agent_has_a_bounded_number_of_connections(carrier):
    """Each takes an entry of the host's connection tracking; those that it closes are free again."""
    assert 900 < in_namespaces(carrier, program=CROWD) < 4096


@pytest.mark.root
@pytest.mark.bubblewrap
@pytest.mark.parametrize("carrier", ["pasta", "slirp4netns"])
def test_an_agent_does_not_fill_the_hosts_table_of_connections(carrier):
    """There a TCP connection stays for two minutes after its end."""
    report = in_namespaces(carrier, program=TRACKED)
    entries = report["entries"]
    assert 100 < entries["tcp"] + entries.get("udp", 0) < 1000 + 50 * 10
    assert 100 < entries["names"] < 1000 + 50 * 10
    assert ("udp" in entries) is (carrier == "slirp4netns")
    assert report["the first hundred"] < 2
    assert report["told"] == []


@pytest.mark.bubblewrap
def test_a_private_network_needs_a_carrier(world):
    found = Host(privileged=True, bwrap="/usr/bin/bwrap", setpriv="/usr/bin/setpriv")
    assert Capability.NETWORK_PRIVATE not in explain.capabilities(found)
    assert any("neither pasta nor slirp4netns" in finding.what for finding in explain.findings(found, None))


@pytest.mark.root
@pytest.mark.bubblewrap
def test_names_are_found_wherever_the_host_moves():
    """Its resolv.conf is replaced by rename; the queries follow it, also to an address that only the host reaches."""
    assert in_namespaces(program=MOVING) == {
        "at first": "203.0.113.5",
        "a service of the host": "203.0.113.6",
        "its user": "alice",
        "over TCP": "203.0.113.6",
        "the second server, after a sleep": "203.0.113.5",
        "a new collector": "203.0.113.5",
        "IPv6": "203.0.113.7",
        "a start with IPv6 alone": "203.0.113.7",
    }


@pytest.mark.root
@pytest.mark.bubblewrap
def test_names_are_found_by_the_agents_of_an_ordinary_user():
    found = in_namespaces("MOVING", program=AS_USER)
    assert found.pop("IPv6") == found.pop("a start with IPv6 alone") == "203.0.113.7"
    assert found == dict.fromkeys(
        ["at first", "over TCP", "the second server, after a sleep", "a new collector"], "203.0.113.5"
    )


@pytest.mark.root
@pytest.mark.bubblewrap
def test_a_port_in_a_private_network_is_used_by_an_ordinary_user_too():
    # pasta hides its descriptors from its own user.
    report = in_namespaces("PORT", program=AS_USER)
    assert report["endpoint"].startswith("tcp:127.0.0.1:")
    assert report["later"] == report["endpoint"]
    assert report["told"] == [], "the rate of its connections is bounded"


@pytest.mark.root
@pytest.mark.bubblewrap
def test_what_an_agent_does_not_read_counts_as_its_memory():
    """It waits in sockets of the process that carries the traffic; the agent's limit is 64 MiB."""
    report = in_namespaces("pasta", program=BUFFERS)
    assert report["sockets"] == 40
    assert report["bytes"] < 80 << 20


@pytest.mark.root
@pytest.mark.bubblewrap
def test_a_host_whose_network_comes_late_or_has_no_gateway():
    """The manager tries again as long as a provider is unavailable: at boot the network may come after the agents."""
    report = in_namespaces(program=ROUTES)
    assert report.pop("without a network") == "it has no default route"
    assert report.pop("203.0.113.5:80") == "reached"
    assert len(report) == 4 and not {"reached", ""} & set(report.values()), report


@pytest.mark.root
def test_a_route_of_the_host_does_not_win_against_a_denied_network():
    """Newer versions of pasta copy such routes, as DHCP sets them for the metadata of clouds."""
    name = f"copied{os.getpid()}"
    ip = lambda *words: (
        subprocess.run(["ip", "-n", name, *words], check=True, capture_output=True, text=True).stdout
    )
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        ip("link", "set", "lo", "up")
        ip("link", "add", network._INTERFACE, "type", "veth", "peer", "name", "other")
        ip("link", "set", "other", "up")
        ip("address", "add", "198.18.5.2/24", "dev", network._INTERFACE)
        ip("link", "set", network._INTERFACE, "up")
        ip("route", "add", "default", "via", "198.18.5.1")
        ip("route", "add", "169.254.169.254", "via", "198.18.5.1")
        with open(f"/run/netns/{name}") as namespace:
            inside = network._Inside(namespace.fileno(), None)
            network._block(inside, [ip_network("169.254.0.0/16")], Deadline(10), udp=False)
        assert "local 169.254.169.254" in ip("route", "get", "169.254.169.254")
        assert "via 198.18.5.1" in ip("route", "get", "203.0.113.5")
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
