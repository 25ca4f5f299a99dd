"""Kills agents whose netlink sockets hold too much kernel memory, which no control group counts.

An error reply on a netlink socket repeats the whole request and waits in the socket's receive queue.  Programs
need such sockets (getifaddrs(3)), so they cannot be refused.
The queues are read from /proc/PID/net/netlink, for every network namespace in which an agent runs, as soon as the
host's unreclaimable memory has grown.  Agents share no namespace but the host's, which is left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

from dispatcher.common.humanize import size
from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.lifecycle import Change, EventKind
from dispatcher.manager.agents.registry import Registry
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.names import printable

INTERVAL = 0.05  # seconds between checks of the host's memory: one thread can queue gigabytes a second
ALLOWED = 64 << 20  # bytes in the queues of an agent
GROWTH = 64 << 20  # growth of the host's unreclaimable memory, in bytes, that starts a search
REGULARLY = 10.0  # seconds between searches without such growth

_log = logging.getLogger("dispatcher.manager")


class NetlinkGuard:
    """Checks the agents of this host that have a user id of their own; call `check` at each `INTERVAL`.

    :param kill: sends a signal to a process.
    """

    def __init__(
        self, registry: Registry, *, proc: Path = Path("/proc"), kill: Callable[[int, int], None] = os.kill
    ) -> None:
        self._registry, self._proc, self._kill = registry, proc, kill
        self._lowest = 0
        self._next = 0.0

    def check(self) -> None:
        """Search if the memory has grown, and kill every agent whose queues hold more than `ALLOWED`."""
        used = _unreclaimable(self._proc)
        self._lowest = min(self._lowest, used)
        if used - self._lowest < GROWTH and boottime() < self._next:
            return
        self._lowest, self._next = used, boottime() + REGULARLY
        owners = {agent.row.uid: agent for agent in list(self._registry.agents.values())}
        for pids in self._namespaces():
            queued = _queued(self._proc, pids)
            if queued <= ALLOWED:
                continue
            # A process can make root the owner of its /proc/PID, so its credentials are read.
            if found := [owners[uid] for pid in pids if (uid := _uid(self._proc, pid)) in owners]:
                self._end(found[0], pids, queued)

    def _namespaces(self) -> list[list[int]]:
        """Return the processes of each network namespace except the manager's own and the host's.

        The host's is another one where the manager runs in a container that sees the host's processes.
        """
        found: dict[int, list[int]] = {}
        for name in os.listdir(self._proc):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    found.setdefault(os.stat(f"{self._proc}/{name}/ns/net").st_ino, []).append(int(name))
        for name in ("self", "1"):
            with contextlib.suppress(OSError):
                found.pop(os.stat(self._proc / name / "ns/net").st_ino, None)
        return list(found.values())

    def _end(self, agent: Agent, pids: list[int], queued: int) -> None:
        """Kill all processes; when the first one of a PID namespace ends, the kernel kills the others in it."""
        detail = f"killed by the manager: its netlink sockets held {size(queued)} of memory beyond its limit"
        agent.killed_because = detail
        for pid in pids:
            with contextlib.suppress(OSError):
                self._kill(pid, signal.SIGKILL)
        _log.error("%s: %s", printable(agent.row.name), detail)
        self._registry.change(agent, lambda _: Change({}, [(EventKind.OUT_OF_MEMORY, detail)]))


def _unreclaimable(proc: Path) -> int:
    """Return the size of the kernel's unreclaimable memory, in bytes."""
    _, _, rest = (proc / "meminfo").read_bytes().partition(b"\nSUnreclaim:")
    return int(rest.split(None, 1)[0]) << 10 if rest else 0


def _queued(proc: Path, pids: list[int]) -> int:
    """Return the bytes in the receive queues of a network namespace, 0 if its processes are gone."""
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = (proc / f"{pid}/net/netlink").read_bytes().splitlines()
            return sum(int(line.split()[4]) for line in lines[1:])
    return 0


def _uid(proc: Path, pid: int) -> int:
    """Return the user id of a process, -1 if it is gone."""
    with contextlib.suppress(OSError):
        for line in (proc / f"{pid}/status").read_bytes().splitlines():
            if line.startswith(b"Uid:"):
                return int(line.split()[1])
    return -1
