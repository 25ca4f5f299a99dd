"""Measures what agents hold of kernel memory and tables that no control group counts, from /proc.

Each meter has a condition that is cheap to check, and a search for what each agent holds.  A search takes bounded
time, whatever the agents do, or its condition is rare.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatcher.common.humanize import size
from dispatcher.manager.agents.open_files import directories_of
from dispatcher.manager.agents.socket_memory import internet_sockets, socket_memory, unlisted

NETLINK = 64 << 20  # bytes in the queues of an agent's netlink sockets
SOCKETS = 64 << 20  # bytes of an agent's sockets beyond those that its control group counts
FEW_SOCKETS = 8  # of TCP, UDP and so on: too few to hold much
UNLISTED = 500  # sockets of an agent whose memory cannot be read
DIRECTORIES = 4_096  # open directories of an agent: up to 13 KiB each
LOCKS = 10_000  # file locks of an agent: about 2 MiB
READ_LOCKS = 25_000  # of the host's locks, newest first; the time grows with the square: 0.1 s
MANY_LOCKS = 2_000  # locks of an agent, where the host has more than are read
#: Of what the kernel has for all namespaces: the host's use that starts a search, and an agent's that is too much.
POOL, POOL_SHARE = 1 / 2, 1 / 8
HELPERS = 2  # processes in an agent's control group that are not its own: pasta
_PAGE = os.sysconf("SC_PAGE_SIZE")
_NO_LIMIT = 1 << 62  # the kernel rounds its largest number down to a page
#: FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING (net/tcp_states.h): connections that a process may have closed.
_CLOSED = frozenset({b"04", b"05", b"09", b"0B"})


@dataclass(frozen=True)
class Processes:
    """An agent's processes, as the host sees them.

    :ivar members: those with its user id.
    :ivar of_network: all in its network namespace, () if that is the host's; threads, where the first has ended.
    :ivar to_kill: its members, and all in its PID namespace if that is not the host's.
    """

    members: tuple[int, ...]
    of_network: tuple[int, ...]
    to_kill: tuple[int, ...]


@dataclass(frozen=True)
class Excess:
    """What an agent holds too much of, as a sentence."""

    uid: int
    detail: str


Agents = Mapping[int, Processes]
Search = Callable[[Path, Agents], Iterable[Excess]]


def netlink(proc: Path, agents: Agents) -> Iterator[Excess]:
    """Find queues of netlink sockets: an error reply repeats the whole request and waits in the receive queue.

    Programs need such sockets (getifaddrs(3)), so they cannot be refused.
    """
    for uid, processes in agents.items():
        held = sum(int(line.split()[4]) for line in _lines(proc, processes.of_network, "net/netlink"))
        if held > NETLINK:
            yield Excess(uid, f"its netlink sockets held {size(held)} of memory beyond its limit")


def sockets(proc: Path, agents: Agents) -> Iterator[Excess]:
    """Find memory of sockets that the control group does not count.

    It counts what TCP sends and all that is received, not: data of UDP that waits for more (MSG_MORE), errors and
    times of sent packets (MSG_ERRQUEUE), connections that nobody has accepted.
    """
    for uid, processes in agents.items():
        process = _alive(proc, processes.of_network)
        if process is None:
            continue
        if (found := unlisted(process)) > UNLISTED:
            yield Excess(uid, f"it had {found:,} sockets without an address, whose memory no limit counts")
        if internet_sockets(process) <= FEW_SOCKETS or (counted := counted_memory(proc, processes)) is None:
            continue
        if (held := sum(socket_memory(process)) - counted) > SOCKETS:
            yield Excess(uid, f"its sockets held {size(held)} of memory beyond its limit")


def directories(proc: Path, agents: Agents) -> Iterator[Excess]:
    """Count open directories: what was read of one, and not yet asked for, is kept with it."""
    for uid, processes in agents.items():
        found = directories_of(proc, processes.members, DIRECTORIES)
        if found > DIRECTORIES:
            yield Excess(uid, f"it had {found:,} directories open or more, whose memory no limit counts")


def file_locks(proc: Path, agents: Agents) -> Iterator[Excess]:
    """Count the locks of byte ranges (F_SETLK), which SQLite needs; each takes 192 bytes.

    The kernel reads its list from the begin for each page, so only the newest are read.  New ones shift the
    others, which then are read twice: each counts once.
    """
    owners = {pid: uid for uid, processes in agents.items() for pid in processes.members}
    held: dict[int, set[bytes]] = {}
    with (proc / "locks").open("rb") as file:
        lines = list(itertools.islice(file, READ_LOCKS))
    for line in lines:
        lock, pid = file_lock(line)
        if (uid := owners.get(pid)) is not None:
            held.setdefault(uid, set()).add(lock)
    allowed = LOCKS if len(lines) < READ_LOCKS else MANY_LOCKS
    for uid, locks in held.items():
        if len(locks) > allowed:
            yield Excess(uid, f"it held {len(locks):,} file locks or more, whose memory no limit counts")


def file_lock(line: bytes) -> tuple[bytes, int]:
    """Return a lock of /proc/locks without its number, and the process that has it or waits for it."""
    fields = [field for field in line.split()[1:] if field != b"->"]
    return b" ".join(fields), int(fields[3])


def tcp_memory(proc: Path, agents: Agents) -> Iterator[Excess]:
    """Find buffers of TCP connections, of which the kernel has `net.ipv4.tcp_mem` for all namespaces."""
    limit = _limit(proc, "tcp_mem") * _PAGE
    for uid, processes in agents.items():
        if not processes.of_network:
            continue  # its datagrams, which are counted with them, cannot be told from the host's
        counted = (counted_memory(proc, processes) or 0) - _datagrams(proc, processes)
        process = _alive(proc, processes.of_network)
        # The connections that nobody has accepted are counted in the namespace only.
        held = max(counted, socket_memory(process)[0] if process else 0)
        if held > limit * POOL_SHARE:
            yield Excess(
                uid, f"its TCP connections held {size(held)} of the {size(limit)} that the host has for all"
            )


def udp_memory(proc: Path, agents: Agents) -> Iterator[Excess]:
    """Find queues of datagrams, of which the kernel has `net.ipv4.udp_mem` for all namespaces."""
    limit = _limit(proc, "udp_mem") * _PAGE
    for uid, processes in agents.items():
        if (held := _datagrams(proc, processes)) > limit * POOL_SHARE:
            yield Excess(uid, f"its UDP sockets held {size(held)} of the {size(limit)} that the host has for all")


def orphans(proc: Path, agents: Agents) -> Iterator[Excess]:
    """Find TCP connections that a process has closed and whose data is unsent: `net.ipv4.tcp_max_orphans`."""
    limit = _limit(proc, "tcp_max_orphans")
    for uid, processes in agents.items():
        lines = _lines(proc, processes.of_network, "net/tcp", "net/tcp6")
        held = sum(map(is_orphan, lines))
        if held > limit * POOL_SHARE:
            yield Excess(
                uid, f"it left {held:,} closed TCP connections of the {limit:,} that the host has for all"
            )


def is_orphan(line: bytes) -> bool:
    """Whether a line of /proc/net/tcp is a connection without a process, other than its record (timer 3)."""
    fields = line.split()
    return fields[3] in _CLOSED and not fields[5].startswith(b"03") and fields[9] == b"0"


def counted_memory(proc: Path, processes: Processes) -> int | None:
    """Return the bytes of socket buffers that an agent's control group counts; None if it counts none."""
    with contextlib.suppress(OSError, ValueError):
        text = (proc / f"{processes.members[0]}/cgroup").read_text(encoding="utf-8")
        for _, controllers, path in (line.split(":", 2) for line in text.splitlines()):
            group = proc.parent / "sys/fs/cgroup" / controllers / path[1:]
            if controllers not in {"", "memory"} or not (group / "memory.stat").exists():
                continue
            inside = set(map(int, (group / "cgroup.procs").read_bytes().split()))
            if len(inside.difference(processes.members, processes.to_kill)) > HELPERS:
                return None
            if controllers:
                limit = int((group / "memory.kmem.tcp.limit_in_bytes").read_bytes())
                return int((group / "memory.kmem.tcp.usage_in_bytes").read_bytes()) if limit < _NO_LIMIT else None
            fields = (group / "memory.stat").read_bytes().split()
            return int(fields[fields.index(b"sock") + 1])
    return None


def pool_use(sockstat: bytes) -> dict[str, int]:
    """Return what /proc/net/sockstat counts for the whole host: pages of TCP and UDP, orphans."""
    fields = {line.split()[0]: line.split() for line in sockstat.splitlines()}
    tcp, udp = fields.get(b"TCP:", []), fields.get(b"UDP:", [])

    def value(words: list[bytes], name: bytes) -> int:
        return int(words[words.index(name) + 1]) if name in words else 0

    return {
        "tcp_mem": value(tcp, b"mem"),
        "udp_mem": value(udp, b"mem"),
        "tcp_max_orphans": value(tcp, b"orphan"),
    }


def full_pools(proc: Path) -> Iterator[Search]:
    """Yield the searches for those pools of which the host uses more than half."""
    for name, used in pool_use((proc / "net/sockstat").read_bytes()).items():
        if used and used > _limit(proc, name) * POOL > 0:
            yield {"tcp_mem": tcp_memory, "udp_mem": udp_memory, "tcp_max_orphans": orphans}[name]


def _limit(proc: Path, name: str) -> int:
    """Return the largest value of a limit of the kernel, in its own unit; 0 outside the host's network."""
    with contextlib.suppress(FileNotFoundError):
        return int((proc / "sys/net/ipv4" / name).read_bytes().split()[-1])
    return 0


def _datagrams(proc: Path, processes: Processes) -> int:
    """Return the bytes in receive queues of datagram sockets, with the kernel's own data."""
    names = ("net/udp", "net/udp6", "net/udplite", "net/udplite6")
    lines = _lines(proc, processes.of_network, *names)
    return sum(int(line.split()[4].partition(b":")[2], 16) for line in lines)


def _lines(proc: Path, pids: Iterable[int], *names: str) -> Iterator[bytes]:
    """Yield the lines, but the first, of files about a network namespace; none if its processes are gone."""
    if (alive := _alive(proc, pids)) is None:
        return
    for name in names:
        with contextlib.suppress(OSError), (alive / name).open("rb") as file:
            yield from itertools.islice(file, 1, None)


def _alive(proc: Path, pids: Iterable[int]) -> Path | None:
    """Return the directory of the first of some processes that is there; its network namespace is listed in it."""
    return next((proc / str(pid) for pid in pids if (proc / f"{pid}/net/netlink").exists()), None)
