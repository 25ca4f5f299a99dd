"""Who listens on a TCP port: is a port's listener the agent's own?  Reads /proc/net and /proc/PID/fd."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterable

from dispatcher.plugin import ProviderError
from dispatcher_subprocess import procfs

NOT_YET = "it does not listen yet"
_LISTEN = b"0A"
_ANY4, _LOOPBACK4 = "00000000", "0100007F"
_ANY6, _LOOPBACK6 = "0" * 32, "0000000000000000FFFF00000100007F"


def listening(port: int, pid: str = "self") -> frozenset[int]:
    """Return the inodes of the sockets that a connection to 127.0.0.1:`port` could reach.

    :param pid: a process whose network namespace is looked at.
    """
    found = set()
    wanted = f"{port:04X}"
    for table, hosts in (("tcp", {_ANY4, _LOOPBACK4}), ("tcp6", {_ANY6, _LOOPBACK6})):
        for line in (procfs.read(f"/proc/{pid}/net/{table}") or b"").splitlines()[1:]:
            fields = line.split()
            host, _, number = fields[1].decode().partition(":")
            if fields[3] == _LISTEN and number == wanted and host in hosts:
                found.add(int(fields[9]))
    return frozenset(found)


def belongs(inodes: frozenset[int], pids: Iterable[int]) -> bool:
    """Whether every one of some sockets is open in one of some processes."""
    missing = set(inodes)
    for pid in pids:
        missing.difference_update(procfs.open_inodes(pid, "socket"))
        if not missing:
            return True
    return not missing


class Ports:
    """Chooses TCP ports; one that was given to an agent is not given again while that agent starts."""

    def __init__(self, first: int, last: int) -> None:
        self._first = first
        self._last = last
        self._next = first
        self._lock = threading.Lock()

    def choose(self, taken: Callable[[], Iterable[int]]) -> int:
        """Return a port that is free now and that no known agent was given.

        :raises ProviderError: none is free.
        """
        avoid = frozenset(taken())
        with self._lock:
            for _ in range(self._last - self._first + 1):
                port = self._next
                self._next = port + 1 if port < self._last else self._first
                if port not in avoid and _free(port):
                    return port
        raise ProviderError(
            "No TCP port is free",
            why=f"all of {self._first} to {self._last} are taken",
            fix="widen providers.subprocess.ports, or use {socket}",
        )


def _free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise
    return True


class Verified:
    """Remembers which listening sockets were seen to be an agent's own, to look for them once."""

    def __init__(self) -> None:
        self._known: dict[str, frozenset[int]] = {}

    def fault(self, run: str, inodes: frozenset[int], pids: Callable[[], Iterable[int]]) -> str:
        """Return why an agent's port must not be used now, "" when its listener is its own.

        :param run: token of the agent's run; :param inodes: of the listeners; :param pids: its processes.
        """
        if not inodes:
            return NOT_YET
        if self._known.get(run) == inodes:
            return ""
        if not belongs(inodes, pids()):
            return "its port is held by a process that is not the agent's"
        self._known[run] = inodes
        return ""

    def forget(self, run: str) -> None:
        """Drop what is known of a run that is over."""
        self._known.pop(run, None)
