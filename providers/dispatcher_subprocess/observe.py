"""The state of an agent, and whether the listener on its port is its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from dispatcher.plugin import BackendState, Endpoint, Observation
from dispatcher_subprocess import processes, procfs
from dispatcher_subprocess.journal import Journals, Record
from dispatcher_subprocess.stop import Stopper, gone
from dispatcher_subprocess.suspend import Suspender

NOT_YET = "it does not listen yet"
_WAIT = 1.0  # seconds that an observation waits for an operation that holds the agent
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


class PortOwners:
    """Remembers which listening sockets are an agent's own, so that its processes are searched once."""

    def __init__(self) -> None:
        self._known: dict[str, frozenset[int]] = {}

    def fault(self, run: str, inodes: frozenset[int], pids: Callable[[], Iterable[int]]) -> str:
        """Return why an agent's port must not be used now, "" if its listener is its own.

        :param run: token of the agent's run; :param inodes: of the listeners; :param pids: its processes.
        """
        if not inodes:
            return NOT_YET
        if self._known.get(run) == inodes:
            return ""
        if not belongs(inodes, pids()):
            return "another process listens on its port"
        self._known[run] = inodes
        return ""

    def forget(self, run: str) -> None:
        """Drop a run that is over."""
        self._known.pop(run, None)


class Observer:
    """Observes agents; cleans up after one that is found to have ended."""

    def __init__(self, journals: Journals, stopper: Stopper, suspender: Suspender) -> None:
        self._journals, self._stopper, self._suspender = journals, stopper, suspender
        self._port_owners = PortOwners()

    def observe(self, record: Record | None) -> Observation:
        """Return the state of an agent, given its journal's content."""
        if record is None:
            return Observation(state=BackendState.ABSENT)
        if record.ended is None and gone(record):
            # A clean-up holds the lock for a moment, a stop or a start for longer.
            wait = 0.0 if record.stop_requested or record.main is None else _WAIT
            with self._journals.try_locked(record.name, wait) as held:
                if not held and record.main is None:
                    return Observation(state=BackendState.STARTING, spec_hash=record.spec_hash)
                if held:
                    current = self._journals.read(record.name)
                    if current is None:
                        return Observation(state=BackendState.ABSENT)
                    record = self._stopper.clean_up(current)
        if gone(record):
            return Observation(
                state=BackendState.STOPPED,
                started_at=record.started_at,
                spec_hash=record.spec_hash,
                exit_reason=record.ended or "",
            )
        suspended = self._suspender.is_suspended(record)
        endpoint, detail = self._endpoint(record)
        if record.helper and not procfs.lives(record.helper.pid, record.helper.start):
            detail = "the process that carries its network has ended: restart it"
        return Observation(
            state=BackendState.SUSPENDED if suspended else BackendState.RUNNING,
            endpoint=endpoint,
            owner_uid=record.owner_uid if endpoint and endpoint.kind == "unix" else None,
            started_at=record.started_at,
            spec_hash=record.spec_hash,
            detail=detail,
        )

    def _endpoint(self, record: Record) -> tuple[Endpoint | None, str]:
        """Return the endpoint, or None and why the listener is not known to be the agent's."""
        endpoint = Endpoint.parse(record.endpoint)
        if endpoint.kind != "tcp":
            return endpoint, ""
        if record.helper and record.init and not listening(endpoint.port, str(record.init.pid)):
            return None, NOT_YET
        fault = self._port_owners.fault(
            record.token, listening(endpoint.port), functools.partial(self._pids, record)
        )
        return (None, fault) if fault else (endpoint, "")

    def _pids(self, record: Record) -> Sequence[int]:
        """Return the processes that may listen on an agent's port: its own, or the helper that forwards to it."""
        if record.helper:
            return [record.helper.pid]
        return [process.pid for process in processes.members(record, self._stopper.group(record))]

    def forget(self, record: Record) -> None:
        """Drop what is remembered of a run that is over."""
        self._port_owners.forget(record.token)
