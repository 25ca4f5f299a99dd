"""Kills agents that hold too much kernel memory of a kind that no control group counts.

The host's unreclaimable memory and its pools for sockets are checked often; what each agent holds is searched for
only when they have grown.  An agent is killed for what its own processes hold, and never a process of the host.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from dispatcher.manager.agents.kernel_meters import (
    Excess,
    Processes,
    Search,
    directories,
    file_locks,
    full_pools,
    netlink,
    sockets,
)
from dispatcher.manager.agents.lifecycle import Change, EventKind
from dispatcher.manager.agents.registry import Registry
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.names import printable

INTERVAL = 0.05  # seconds between checks of the host's memory: one thread can queue gigabytes a second
GROWTH = 64 << 20  # growth of the host's memory for the kernel, in bytes, that starts a search
REGULARLY = 10.0  # seconds between searches without such growth
SELDOM = 50  # such a search is repeated after this many times its own duration, if that is longer
REST = 4  # a search of a pool is repeated after this many times its own duration

_EXPLAINED = (
    *(b"MemFree:", b"Buffers:", b"Cached:", b"SwapCached:", b"AnonPages:"),
    *(b"Slab:", b"KernelStack:", b"PageTables:", b"SecPageTables:", b"Percpu:"),
)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_log = logging.getLogger("dispatcher.manager")


class KernelMemoryGuard:
    """Checks the agents of this host that have a user id of their own; call `check` at each `INTERVAL`.

    :param kill: sends a signal to a process.
    """

    def __init__(
        self, registry: Registry, *, proc: Path = Path("/proc"), kill: Callable[[int, int], None] = os.kill
    ) -> None:
        self._registry, self._proc, self._kill = registry, proc, kill
        self._slab, self._pages = _Growth(), _Growth()
        self._next = self._next_pools = 0.0

    def check(self) -> None:
        """Kill every agent that holds too much of what the host has begun to run out of."""
        begun = boottime()
        if not (searches := list(self._due(begun))):
            return
        agents = self._processes()
        ended: set[int] = set()
        for search in searches:
            for excess in search(self._proc, agents):
                if excess.uid not in ended:
                    ended.add(excess.uid)
                    self._end(excess)
        now = boottime()
        self._next_pools = now + REST * (now - begun)
        if sockets in searches:
            self._next = now + max(REGULARLY, SELDOM * (now - begun))

    def _due(self, now: float) -> Iterator[Search]:
        slab, pages = _kernel_memory(self._proc)
        grown = self._slab.grown(slab), self._pages.grown(pages)
        if grown[0] or now >= self._next:
            yield from (netlink, file_locks, sockets, directories)
        elif grown[1]:
            yield sockets
        if now >= self._next_pools:
            yield from full_pools(self._proc)

    def _processes(self) -> dict[int, Processes]:
        """Return the processes of each agent that has some, by its user id.

        A process can make root the owner of its /proc/PID, so its credentials are read.  The namespaces of the
        host are others than the manager's where that runs in a container that sees the host's processes.
        """
        owners = {agent.row.uid for agent in list(self._registry.agents.values())}
        members: dict[int, list[int]] = {}
        spaces: dict[str, dict[int, list[int]]] = {"net": {}, "pid": {}}
        inside: dict[int, dict[str, int]] = {}
        for name in os.listdir(self._proc):
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError):
                pid, alive = int(name), self._living(name)
                inside[pid] = {kind: self._namespace(alive, kind) for kind in spaces}
                for kind, found in spaces.items():
                    found.setdefault(inside[pid][kind], []).append(int(alive) if kind == "net" else pid)
                if (uid := _uid(self._proc, name)) in owners:
                    members.setdefault(uid, []).append(pid)
        for name in ("self", "1"):
            for kind, found in spaces.items():
                with contextlib.suppress(OSError):
                    found.pop(self._namespace(name, kind), None)

        def together(pids: list[int], kind: str) -> Iterator[int]:
            for number in {inside[pid][kind] for pid in pids}:
                yield from spaces[kind].get(number, ())

        return {
            uid: Processes(tuple(pids), tuple(together(pids, "net")), tuple({*pids, *together(pids, "pid")}))
            for uid, pids in members.items()
        }

    def _living(self, pid: str) -> str:
        """Return the number of a process, or of a thread if its first, which has the namespaces, has ended."""
        threads = [pid]
        if not os.path.exists(f"{self._proc}/{pid}/ns/net"):
            threads = os.listdir(f"{self._proc}/{pid}/task")
        return next((thread for thread in threads if os.path.exists(f"{self._proc}/{thread}/ns/net")), pid)

    def _namespace(self, pid: str, kind: str) -> int:
        return os.stat(f"{self._proc}/{pid}/ns/{kind}").st_ino

    def _end(self, excess: Excess) -> None:
        """Kill all processes; when the first one of a PID namespace ends, the kernel kills the others in it."""
        agents = [agent for agent in list(self._registry.agents.values()) if agent.row.uid == excess.uid]
        now = self._processes().get(excess.uid)  # since the search a number may have become another process
        if not agents or now is None:
            return
        (agent, *_), detail = agents, f"killed by the manager: {excess.detail}"
        agent.killed_because = detail
        for pid in now.to_kill:
            with contextlib.suppress(OSError):
                self._kill(pid, signal.SIGKILL)
        _log.error("%s: %s", printable(agent.row.name), detail)
        self._registry.change(agent, lambda _: Change({}, [(EventKind.OUT_OF_MEMORY, detail)]))


class _Growth:
    """Tells when a size has grown by `GROWTH` above the lowest since then."""

    def __init__(self) -> None:
        self._lowest = 0

    def grown(self, used: int) -> bool:
        self._lowest = min(self._lowest, used)
        if used - self._lowest < GROWTH:
            return False
        self._lowest = used
        return True


def _kernel_memory(proc: Path) -> tuple[int, int]:
    """Return the sizes of the kernel's unreclaimable objects, and of the pages that nothing explains, in bytes.

    The latter are pages of sockets and drivers.  Each processor keeps free pages, whose number changes fast: they
    are not in MemFree, and are subtracted.
    """
    fields = _read(proc / "meminfo").split()
    sizes = {name: int(value) for name, value in itertools.pairwise(fields) if name.endswith(b":")}
    explained = sum(sizes.get(name, 0) for name in _EXPLAINED)
    pages = sizes.get(b"MemTotal:", 0) - explained << 10
    with contextlib.suppress(OSError):
        kept = _read(proc / "zoneinfo").split(b" count: ")[1:]
        pages -= sum(int(each.split(None, 1)[0]) for each in kept) * _PAGE
    return sizes.get(b"SUnreclaim:", 0) << 10, pages


def _read(path: Path) -> bytes:
    """Read a file that is read very often, cheaply."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(descriptor, 1 << 18), b""))
    finally:
        os.close(descriptor)


def _uid(proc: Path, pid: str) -> int:
    """Return the user id of a process.

    :raises OSError: it is gone.
    """
    for line in (proc / pid / "status").read_bytes().splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    return -1
