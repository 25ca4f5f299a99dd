"""Agents that hold kernel memory which no limit counts are found by their processes and namespaces, and killed."""

import os

import pytest

from dispatcher.manager.agents import kernel_memory_guard, kernel_meters
from dispatcher.manager.agents.kernel_memory_guard import KernelMemoryGuard

HEAD = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n"
PAGE = os.sysconf("SC_PAGE_SIZE")


class Agents:
    """A registry of agents by user id, with what was reported of them."""

    def __init__(self, *uids):
        self.agents, self.events = {}, []
        for uid in uids:
            agent = type("Agent", (), {"killed_because": ""})()
            agent.row = type("Row", (), {"uid": uid, "name": f"u{uid}"})()
            self.agents[agent.row.name] = agent

    def change(self, agent, decide):
        self.events += [(agent.row.name, detail) for _, detail in decide(agent.row).events]


@pytest.fixture
def proc(tmp_path):
    found = tmp_path / "proc"
    (found / "net").mkdir(parents=True)
    (found / "sys/net/ipv4").mkdir(parents=True)
    (found / "locks").touch()
    pool(found)
    return found


@pytest.fixture
def host(proc):
    """A /proc: `host(pid, namespace, uid, queued)` makes a process there; its PID namespace has the same name."""

    def process(pid, namespace, uid=0, queued=(), **files):
        here = proc / str(pid)
        (here / "ns").mkdir(parents=True)
        for kind in ("net", "pid"):
            (proc / f"{kind}-{namespace}").touch()
            os.link(proc / f"{kind}-{namespace}", here / "ns" / kind)
        (here / "net").mkdir()
        (here / "task" / str(pid)).mkdir(parents=True)
        rows = "".join(
            f"0000000000000000 0   {at}  00000000 {size} 0 0 2 0 77\n" for at, size in enumerate(queued)
        )
        (here / "net/netlink").write_text(HEAD + rows)
        for name, lines in files.items():
            (here / "net" / name).write_text("\n".join(["sl ...", *lines, ""]))
        (here / "cgroup").write_text(f"9:pids:/x\n3:memory:/made/{namespace}\n0::/\n")
        (here / "status").write_text(f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")

    process("self", "host")
    return process


def pool(proc, tcp=0, udp=0, orphan=0):
    """Pools for sockets, of 800 pages or connections each, and what the host uses of them."""
    lines = f"TCP: inuse 3 orphan {orphan} tw 0 alloc 9 mem {tcp}\nUDP: inuse 1 mem {udp}\nRAW: inuse 0\n"
    (proc / "net/sockstat").write_text(lines)
    for name in ("tcp_mem", "udp_mem"):
        (proc / "sys/net/ipv4" / name).write_text("100 200 800\n")
    (proc / "sys/net/ipv4/tcp_max_orphans").write_text("800\n")


def counted(proc, namespace, size, *pids, limit=1 << 28):
    """The control group of processes counts so many bytes of socket buffers (version 1)."""
    group = proc.parent / "sys/fs/cgroup/memory/made" / namespace
    group.mkdir(parents=True)
    (group / "memory.stat").touch()
    (group / "memory.kmem.tcp.limit_in_bytes").write_text(f"{limit}\n")
    (group / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    (group / "memory.kmem.tcp.usage_in_bytes").write_text(f"{size}\n")


def guard(proc, registry, killed, slab=1000):
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nSUnreclaim:  {slab} kB\n")
    return KernelMemoryGuard(registry, proc=proc, kill=lambda pid, _: killed.append(pid))


def test_the_hosts_namespaces_are_left_alone_though_the_manager_is_in_others(host, proc):
    host(1, "the real host", 0)
    host(5, "the real host", 900, [1 << 30])  # an agent with the host's network
    registry, killed = Agents(900), []
    guard(proc, registry, killed).check()
    assert killed == [] and registry.events == []


def test_all_processes_of_the_agent_are_killed_and_it_is_named(host, proc):
    big = [40 << 20, 30 << 20]
    host(1, "host", 0, [1 << 30])
    host(7, "a", 0, big)  # the first process of the sandbox may be root's
    host(8, "a", 900, big)
    host(9, "b", 901, [1 << 20])
    host(10, "stranger", 77, [1 << 30])
    registry, killed = Agents(900, 901), []
    guard(proc, registry, killed).check()
    assert sorted(killed) == [7, 8]
    assert registry.agents["u900"].killed_because and not registry.agents["u901"].killed_because
    ((name, detail),) = registry.events
    assert name == "u900" and "its netlink sockets held 70.0 MiB" in detail


def test_it_searches_when_memory_has_grown_and_now_and_then(host, proc, monkeypatch):
    registry, killed, now = Agents(900), [], [100.0]
    monkeypatch.setattr(kernel_memory_guard, "boottime", lambda: now[0])
    found = guard(proc, registry, killed)
    found.check()
    host(8, "a", 900, [1 << 30])
    found.check()
    assert not killed, "nothing has grown"
    guard(proc, registry, killed, slab=1000 + (kernel_memory_guard.GROWTH >> 10))
    found.check()
    assert killed == [8]
    found.check()
    assert killed == [8]
    now[0] += kernel_memory_guard.REGULARLY
    found.check()
    assert killed == [8, 8]


def test_the_first_thread_of_a_process_may_have_ended(host, proc):
    """Then the kernel shows its namespaces, its network and its open files with its other threads only."""
    host(8, "a", 900)
    host(80, "a", 900, [1 << 30])
    (proc / "8/task/80").mkdir()
    for path in ("8/ns/net", "8/ns/pid", "8/net/netlink"):
        (proc / path).unlink()
    (proc / "80").rename(proc / "hidden")
    registry, killed = Agents(900), []
    guard(proc, registry, killed).check()
    assert killed == [], "it is gone"
    (proc / "locks").write_text("".join(lock(8, at) for at in range(kernel_meters.LOCKS + 1)))
    found = guard(proc, registry, killed)
    (proc / "hidden").rename(proc / "80")
    listed = os.listdir
    with pytest.MonkeyPatch.context() as patch:  # /proc finds threads by their number, and does not list them
        patch.setattr(os, "listdir", lambda path: [name for name in listed(path) if path != proc or name != "80"])
        found.check()
    assert killed == [8]
    assert "its netlink sockets held 1.0 GiB" in registry.agents["u900"].killed_because


PROTOCOLS = "protocol size sockets memory\nUDP 1344 {udp} 3\nUNIX 1152 {unix} -1\nMPTCP 1 0 -1\nTCP 1 {tcp} -1"


def numbers(proc, pid, used, **of_protocol):
    """How many sockets a network namespace has, and how many of them are listed."""
    (proc / str(pid) / "net/sockstat").write_text(f"sockets: used {used}\nTCP: inuse 5 orphan 0\n")
    text = PROTOCOLS.format(**{"udp": 0, "unix": 0, "tcp": 0, **of_protocol})
    (proc / str(pid) / "net/protocols").write_text(text + "\n")


def queue(sending, received):
    return f"1: 0100007F:0035 00000000:0000 07 {sending:08X}:{received:08X} 00:0 0 0 0 5"


def test_memory_of_sockets_that_their_control_group_does_not_count(host, proc):
    most = kernel_meters.SOCKETS
    for pid, name in enumerate("abcdef", 8):
        host(pid, name, 892 + pid, udp=[queue(most, 0), queue(0, 5)], tcp=[queue(3, 3)])
        numbers(proc, pid, 60, udp=50, unix=10)
    counted(proc, "a", 11, 8)
    counted(proc, "b", 10, 9)
    counted(proc, "c", 0, 10, limit=0x7FFFFFFFFFFFF000)  # no limit: nothing is counted
    counted(proc, "d", 0, 11)
    numbers(proc, 11, 18, udp=8, unix=10)  # too few
    registry, killed = Agents(*range(900, 906)), []  # nothing is known of the last two
    found = guard(proc, registry, killed)
    found.check()
    assert killed == [9]
    assert "its sockets held 64.0 MiB of memory beyond its limit" in registry.agents["u901"].killed_because


def test_sockets_that_no_list_has(host, proc):
    for pid, extra in ((8, 0), (9, 1)):
        host(pid, str(pid), 892 + pid)
        numbers(proc, pid, 15 + kernel_meters.UNLISTED + extra, udp=5, unix=7, tcp=3)
    registry, killed = Agents(900, 901), []
    guard(proc, registry, killed).check()
    assert killed == [9]
    assert "it had 501 sockets without an address" in registry.agents["u901"].killed_because


def test_it_searches_sockets_when_pages_have_grown_that_nothing_explains(host, proc, monkeypatch):
    registry, killed, now = Agents(900), [], [100.0]
    monkeypatch.setattr(kernel_memory_guard, "boottime", lambda: now[0])
    growth = kernel_memory_guard.GROWTH >> 10
    host(8, "a", 900, udp=[queue(1 << 30, 0)])
    counted(proc, "a", 0, 8)
    numbers(proc, 8, 0)
    found = KernelMemoryGuard(registry, proc=proc, kill=lambda pid, _: killed.append(pid))

    def check(unexplained, free_lists=0):
        sizes = {"MemTotal": 900000 + unexplained, "MemFree": 500000, "AnonPages": 400000, "SUnreclaim": 0}
        (proc / "meminfo").write_text("".join(f"{name}:  {size} kB\n" for name, size in sizes.items()))
        pages = f"Node 0, zone Normal\n  pages free 7\n  pagesets\n    cpu: 0\n       count: {free_lists}\n"
        (proc / "zoneinfo").write_text(pages)
        found.check()
        return killed

    for _ in range(2):
        check(0)
    numbers(proc, 8, 30, udp=30)
    assert check(growth - 1) == []
    assert check(growth + 4, free_lists=2) == [], "the processors keep them"
    assert check(2 * growth + 4) == [8]


def test_open_directories_are_counted(host, proc, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_meters, "DIRECTORIES", 10)
    (tmp_path / "file").touch()
    for pid, many in ((8, 10), (9, 11)):
        host(pid, str(pid), 892 + pid)
        table = proc / f"{pid}/task/{pid}/fd"
        table.mkdir()
        for at in range(many):
            (table / str(at)).symlink_to(tmp_path)
        for at in range(many, 50):
            (table / str(at)).symlink_to(tmp_path / "file")
    registry, killed = Agents(900, 901), []
    guard(proc, registry, killed).check()
    assert killed == [9]
    assert "it had 11 directories open" in registry.agents["u901"].killed_because


def lock(pid, start):
    return f"1: POSIX  ADVISORY  WRITE {pid} 00:2b:17 {start} {start}\n"


def test_file_locks_count_once_each_for_the_process_that_has_them(host, proc):
    host(1, "host")
    host(8, "a", 900)
    host(9, "host", 901)  # an agent with the host's network and processes
    many = kernel_meters.LOCKS
    (proc / "locks").write_text(
        "".join(lock(8, at % 100) for at in range(many + 1))  # new locks have shifted the list while it was read
        + "".join(lock(1, at) for at in range(many + 1))
        + lock(-1, 0)
    )
    registry, killed = Agents(900, 901), []
    guard(proc, registry, killed).check()
    assert killed == [], "the host's, and 100 read again and again"
    (proc / "locks").write_text("".join(lock(9, at) for at in range(many + 1)))
    guard(proc, registry, killed).check()
    assert killed == [9]
    assert f"it held {many + 1:,} file locks" in registry.agents["u901"].killed_because


def test_among_more_locks_than_are_read_fewer_are_too_many(host, proc):
    host(8, "a", 900)
    host(9, "b", 901)
    few = [lock(8, at) for at in range(kernel_meters.MANY_LOCKS + 1)]
    rest = [lock(5, at) for at in range(kernel_meters.READ_LOCKS)]
    (proc / "locks").write_text("".join([*few, lock(9, 0), *rest]))
    registry, killed = Agents(900, 901), []
    guard(proc, registry, killed).check()
    assert killed == [8]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"12: POSIX  ADVISORY  READ  77 fe:00:5 0 EOF\n", (b"POSIX ADVISORY READ 77 fe:00:5 0 EOF", 77)),
        (b"12:  -> POSIX  ADVISORY  WRITE 78 fe:00:5 0 9\n", (b"POSIX ADVISORY WRITE 78 fe:00:5 0 9", 78)),
        (b"3: OFDLCK ADVISORY  WRITE -1 00:2b:17 5 5\n", (b"OFDLCK ADVISORY WRITE -1 00:2b:17 5 5", -1)),
    ],
)
def test_lines_of_locks(line, expected):
    assert kernel_meters.file_lock(line) == expected


def test_memory_of_connections_is_what_the_control_group_counts_beside_datagrams(host, proc):
    host(1, "host")
    for pid, name in ((8, "a"), (9, "b"), (10, "c"), (11, "d")):
        datagrams = ["1: 0100007F:0035 00000000:0000 07 00000000:00010000 00:0 0 0 0 5"] if name == "b" else []
        host(pid, name, 892 + pid, udp=datagrams)
    counted(proc, "a", 101 * PAGE, 8, 4)
    counted(proc, "b", 101 * PAGE, 9)  # 16 pages of it are datagrams
    counted(proc, "c", 99 * PAGE, 10)
    counted(proc, "d", 101 * PAGE, 11, 1, 2, 3)  # not its own group
    registry, killed = Agents(900, 901, 902, 903), []
    pool(proc, tcp=400)
    guard(proc, registry, killed).check()
    assert killed == [], "half of the pool is free"
    pool(proc, tcp=401)
    guard(proc, registry, killed).check()
    assert killed == [8]
    assert "its TCP connections held" in registry.agents["u900"].killed_because


def test_control_groups_of_version_2(proc):
    (proc / "8").mkdir()
    (proc / "8/cgroup").write_text("0::/user/a\n")
    group = proc.parent / "sys/fs/cgroup/user/a"
    group.mkdir(parents=True)
    (group / "memory.stat").write_text("anon 5\nsock 12288\nsock_other 7\n")
    (group / "cgroup.procs").write_text("8\n9\n10\n11\n")
    assert kernel_meters.counted_memory(proc, kernel_meters.Processes((8,), (7, 8, 9), (7, 8, 9))) == 12288
    strangers, gone = kernel_meters.Processes((8,), (8,), (8,)), kernel_meters.Processes((99,), (99,), (99,))
    assert kernel_meters.counted_memory(proc, strangers) is kernel_meters.counted_memory(proc, gone) is None


def test_datagrams_and_closed_connections_above_an_eighth_of_a_pool_that_is_half_full(host, proc):
    size = f"{101 * PAGE:08X}"
    orphan = "5: 0100007F:1F90 0100007F:C350 04 00000800:00000000 01:0 0 0 0 0 2 x"
    others = [  # TIME_WAIT, FIN_WAIT2 as a record, one with a process
        orphan.replace(" 04 ", " 06 "),
        orphan.replace(" 04 ", " 05 ").replace(" 01:", " 03:"),
        orphan.replace(" 0 2 x", " 77 2 x"),
    ]
    host(1, "host", 0, tcp=[orphan] * 500)
    host(8, "a", 900, udp6=[f"1: 0:35 0:0 07 00000000:{size} 00:0 0 0 0 5"], udp=[])
    host(9, "b", 901, tcp=[orphan] * 51, tcp6=[orphan] * 50, udp=[])
    host(10, "c", 902, tcp=[orphan] * 100 + others * 500, udp=[])
    registry, killed = Agents(900, 901, 902), []
    pool(proc, udp=401, orphan=401)
    guard(proc, registry, killed).check()
    assert sorted(killed) == [8, 9]
    assert "its UDP sockets held" in registry.agents["u900"].killed_because
    assert "it left 101 closed TCP connections of the 800" in registry.agents["u901"].killed_because
