"""Memory that the kernel keeps for an agent's sockets is bounded, whatever its provider."""

import errno
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dispatcher.manager.agents import kernel_meters
from dispatcher.manager.agents.kernel_memory_guard import KernelMemoryGuard
from dispatcher.testing.kit import processes_of
from tests.support.docker_tools import images
from tests.support.installation import Installation, until

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap, pytest.mark.slow]

#: /netlink: fill the queues of sockets with errors that repeat the request.  /udp: those of datagrams.
#: /refused: errors of calls that take memory of the kernel.
APP = """
import fcntl, http.server, json, os, socket, socketserver, struct, sys, time
os.umask(0o007)
kept = []
def netlink():
    body = b"x" * 30000
    for _ in range(200):
        kept.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        kept[-1].setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            kept[-1].setsockopt(socket.SOL_SOCKET, option, 8 << 20)
        try:
            for number in range(400):
                kept[-1].send(struct.pack("=IHHII", 16 + len(body), 0x7f0, 5, number, 0) + body)
        except OSError:
            pass
    time.sleep(5)
def udp():
    for _ in range(150):
        kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        kept[-1].bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(kept[-1].getsockname())
            sender.setblocking(False)
            try:
                for _ in range(100):
                    sender.send(b"x" * 60000)
            except OSError:
                pass
def locks():
    for number in range(20):
        kept.append(os.memfd_create("a"))
        for at in range(1000):
            fcntl.fcntl(kept[-1], fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 4000 - 2 * at, 1, 0))
    time.sleep(55)  # the regular search comes rarely while it takes long, as on a busy host
def datagrams(number, size, count, prepare=lambda sender: None, flags=0, control=()):
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    for _ in range(number):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        kept.append(sender)
        prepare(sender)
        sender.connect(receiver.getsockname())
        for _ in range(count):
            sender.sendmsg([bytes(size)], control, flags)
    receiver.close()
def corked(number=100):
    datagrams(number, 32000, 2, flags=socket.MSG_MORE)
def many_corked():
    corked(1500)
    time.sleep(55)  # the regular search comes rarely while it takes long, as on a busy host
STAMPS = [(socket.SOL_SOCKET, 37, struct.pack("I", 2))]
def stamped():
    datagrams(20, 60000, 3, control=STAMPS)
def stamped_connections():
    listener = socket.create_server(("127.0.0.1", 0))
    for _ in range(20):
        kept.append(socket.create_connection(listener.getsockname()))
        kept.append(listener.accept()[0])
        for _ in range(10):
            kept[-2].sendmsg([bytes(20000)], STAMPS)
            received = 0
            while received < 20000:
                received += len(kept[-1].recv(65536))
def errors():
    for _ in range(20):
        kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        kept[-1].setsockopt(socket.IPPROTO_IP, 11, 1)
        for _ in range(400):
            try:
                kept[-1].sendto(bytes(60000), ("127.0.0.1", 9))
            except OSError:
                pass
def unaccepted():
    kept.append(socket.create_server(("127.0.0.1", 0), backlog=200))
    for _ in range(100):
        with socket.create_connection(kept[-1].getsockname()) as each:
            each.setblocking(False)
            each.send(bytes(50000))
def disconnected():
    import ctypes
    corked(150)
    for each in kept:
        ctypes.CDLL(None).connect(each.fileno(), bytes(16), 16)
def directories():
    wide = "/data/wide"
    os.makedirs(wide, exist_ok=True)
    kept.extend(os.open(wide, os.O_RDONLY) for _ in range(501))
def first_thread_ended():
    import ctypes, threading
    read, write = os.pipe()
    def work():
        time.sleep(.3)
        file = os.memfd_create("a")
        for at in range(1000):
            fcntl.fcntl(file, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 4000 - 2 * at, 1, 0))
        os.write(write, b"x")
        time.sleep(30)
        os._exit(0)
    if os.fork() == 0:
        threading.Thread(target=work).start()
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
    os.read(read, 1)
def forget():
    for each in kept:
        os.close(each) if isinstance(each, int) else each.close()
    kept.clear()
def tcp():
    listener = socket.create_server(("127.0.0.1", 0))
    for _ in range(10):
        kept.append(socket.create_connection(listener.getsockname()))
        kept.append(listener.accept()[0])
        for each in kept[-2:]:
            each.setblocking(False)
            try:
                while True:
                    each.send(bytes(65536))
            except OSError:
                pass
def closed():
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    for _ in range(100):
        each = socket.create_connection(listener.getsockname())
        kept.append(listener.accept()[0])
        each.setblocking(False)
        try:
            while True:
                each.send(bytes(65536))
        except OSError:
            each.close()
def refused():
    import ctypes, mmap, select
    group = socket.inet_pton(socket.AF_INET6, "ff15::1") + struct.pack("i", 1)
    group4 = socket.inet_aton("239.1.2.3") + bytes(8)
    label = socket.inet_pton(socket.AF_INET6, "::1") + bytes([0, 0, 0, 0, 0, 255, 1, 0, 60, 0]) + bytes(6)
    key = struct.pack("=HH4s", 2, 0, bytes(4)) + bytes(120) + struct.pack("=BBHi", 0, 0, 4, 0) + b"abcd" + bytes(76)
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0)
    poll = select.poll()
    pipes = [os.pipe()[0] for _ in range(1025)]
    for each in pipes[:1024]:
        poll.register(each, select.POLLPRI)
    first, memfd_create = poll.poll(0), ctypes.CDLL(None, use_errno=True).memfd_create
    poll.register(pipes[1024], select.POLLPRI)
    def option(family, kind, *arguments):
        with socket.socket(family, kind) as made:
            made.setsockopt(*arguments)
    acl = struct.pack("<I" + "HHI" * 5, 2, 1, 7, 2**32 - 1, 2, 7, os.getuid(), 4, 7, 2**32 - 1, 16, 7, 2**32 - 1, 32, 0, 2**32 - 1)
    def policy():
        memory = mmap.mmap(-1, 1 << 16)
        address, node = ctypes.addressof(ctypes.c_char.from_buffer(memory)), ctypes.c_ulong(1)
        number = {"x86_64": 237, "aarch64": 235}[os.uname().machine]
        if ctypes.CDLL(None, use_errno=True).syscall(number, ctypes.c_void_p(address), 4096, 2, ctypes.byref(node), 64, 0):
            raise OSError(ctypes.get_errno(), "")
    v4, v6, udp, tcp = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM, socket.SOCK_STREAM
    tries = {
        "filter": lambda: option(v4, udp, socket.SOL_SOCKET, 26, bytes(16)),
        "group": lambda: option(v6, udp, socket.IPPROTO_IPV6, 20, group),
        "group of IPv4": lambda: option(v4, udp, socket.IPPROTO_IP, 35, group4),
        "flow label": lambda: option(v6, udp, socket.IPPROTO_IPV6, 32, label),
        "key": lambda: option(v4, tcp, socket.IPPROTO_TCP, 14, key),
        "packet options": lambda: option(v6, udp, socket.IPPROTO_IPV6, 6, struct.pack("QiI", 65000, 0, 0) + bytes(64984)),
        "nodelay": lambda: option(v4, tcp, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        "lock of an open file": lambda: fcntl.fcntl(os.memfd_create("a"), 37, lock),
        "lock": lambda: fcntl.fcntl(os.memfd_create("a"), fcntl.F_SETLK, lock),
        "poll": lambda: poll.poll(0),
        "huge page": lambda: mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000),
        "huge file": lambda: os.memfd_create("a", 4),
        "access list": lambda: os.setxattr(os.memfd_create("a"), "system.posix_acl_access", acl),
        "default access list": lambda: os.setxattr("/data", "system.posix_acl_default", acl),
        "policy": policy,
        "protocol MPTCP": lambda: socket.socket(v4, tcp, 262).close(),
        "protocol TCP": lambda: socket.socket(v4, tcp, socket.IPPROTO_TCP).close(),
    }
    answers = {"poll of 1024": first}
    for name, call in tries.items():
        try:
            call()
            answers[name] = 0
        except OSError as error:
            answers[name] = error.errno
    for each in pipes:
        os.close(each)
    return answers
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps([socket.if_nameindex(), globals().get(self.path[1:], str)()]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
    def address_string(self):
        return "proxy"
socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler).serve_forever()
"""
APPS = f"""
[defaults]
memory = "256M"
[apps.bubble.subprocess]
command = ["{sys.executable}", "-c", '''{APP.replace("{", "{{").replace("}", "}}")}''', "{{{{socket}}}}"]
[apps.box]
provider = "docker"
[apps.box.docker]
image = "dispatcher-test/probe"
command = ["python3", "-c", '''{APP.replace("{", "{{").replace("}", "}}")}''', "{{{{socket}}}}"]
"""


@pytest.fixture(scope="module", params=["bubble", pytest.param("box", marks=pytest.mark.docker)])
def site(request):
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    if request.param == "box":
        images()
    with Installation(base, APPS) as made:
        made.start("manager")
        made.start("proxy")
        made.add("alice", request.param)
        made.cookie = made.login("alice")
        until("the app answers", lambda: ask(made, "/").status == 200, 60)
        yield made


def ask(site, path):
    return site.web("GET", path, Cookie=site.cookie, Accept="*/*")


def found(site):
    """Why the guard would kill an agent, asked for without killing it."""
    killed, events, uid = set(), [], site.admin("GET", "/agents/alice/runtime").json()["uid"]
    agent = SimpleNamespace(killed_because="", row=SimpleNamespace(uid=uid, name="alice"))
    registry = SimpleNamespace(agents={"alice": agent}, change=lambda *_: events.append(agent.killed_because))
    KernelMemoryGuard(registry, kill=lambda pid, _: killed.add(pid)).check()
    if events:
        assert killed >= set(processes_of(uid)) != set()
    return events


def is_killed(site, path, why):
    answer = ask(site, path)
    assert answer.status != 200, "it was killed before it had answered"

    def told():
        return why in " ".join(site.admin("GET", "/agents/alice/why").json()["sentences"])

    until("the reason is told", told)
    until("it runs again", lambda: ask(site, "/").status == 200, 60)


def test_an_agent_whose_netlink_queues_grow_is_killed_and_told_why(site):
    is_killed(site, "/netlink", "its netlink sockets held")


def test_an_agent_with_thousands_of_file_locks_is_killed_and_told_why(site):
    is_killed(site, "/locks", "file locks")


def test_an_agent_whose_datagrams_wait_for_more_is_killed_and_told_why(site):
    is_killed(site, "/many_corked", "its sockets held")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/corked", "its sockets held"),
        ("/stamped", "its sockets held"),
        ("/stamped_connections", "its sockets held"),
        ("/errors", "its sockets held"),
        ("/unaccepted", "its sockets held"),
        ("/disconnected", "sockets without an address"),
        ("/directories", "directories open"),
        ("/first_thread_ended", "file locks"),
    ],
)
def test_an_agent_with_kernel_memory_that_nothing_counts_is_found(site, path, why, monkeypatch):
    """With lower limits for this guard only, so that little memory does."""
    for name, limit in (("SOCKETS", 2 << 20), ("UNLISTED", 100), ("DIRECTORIES", 500), ("LOCKS", 900)):
        monkeypatch.setattr(kernel_meters, name, limit)
    assert found(site) == []
    assert ask(site, path).status == 200
    events = found(site)
    assert ask(site, "/forget").status == 200
    assert [why in event for event in events] == [True], events


@pytest.mark.parametrize(
    ("path", "name", "limit", "why"),
    [
        ("/unaccepted", "tcp_mem", 1024, "its TCP connections held"),
        ("/tcp", "tcp_mem", 4096, "its TCP connections held"),
        ("/closed", "tcp_max_orphans", 160, "it left"),
    ],
    ids=["unaccepted", "memory", "closed"],
)
def test_an_agent_that_takes_most_of_the_hosts_tcp_is_found(site, path, name, limit, why, monkeypatch):
    """The host's limits are lowered for this guard only, as they are those of everybody."""
    assert ask(site, path).status == 200
    monkeypatch.setattr(kernel_meters, "_limit", lambda _, asked: limit if asked == name else 0)
    events = found(site)
    assert ask(site, "/forget").status == 200
    assert [why in event for event in events] == [True], events


def test_calls_whose_memory_is_counted_nowhere_are_refused_and_interfaces_are_listed(site):
    interfaces, answers = json.loads(ask(site, "/refused").body)
    assert [1, "lo"] in interfaces
    assert answers == {
        "filter": errno.EPERM,
        "group": errno.ENOPROTOOPT,
        "group of IPv4": errno.ENOPROTOOPT,
        "flow label": errno.ENOPROTOOPT,
        "key": errno.ENOPROTOOPT,
        "packet options": errno.ENOPROTOOPT,
        "nodelay": 0,
        "lock of an open file": errno.EINVAL,
        "lock": 0,
        "poll of 1024": [],
        "poll": errno.EINVAL,
        "huge page": errno.ENOMEM,
        "huge file": errno.EINVAL,
        "access list": errno.EOPNOTSUPP,
        "default access list": errno.EOPNOTSUPP,
        "policy": errno.EPERM,
        "protocol MPTCP": errno.EPROTONOSUPPORT,
        "protocol TCP": 0,
    }


def test_datagrams_in_queues_are_below_the_limit_of_memory(site):
    assert ask(site, "/udp").status == 200
    lines = Path("/proc/net/sockstat").read_text().splitlines()
    (pages,) = [line.split()[-1] for line in lines if line.startswith("UDP: ")]
    assert int(pages) * 4096 < 300 << 20
