"""The state of an agent, whether the listener on its port is its own, what it uses, and when it ends."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Hashable
from dataclasses import replace

from dispatcher.plugin import BackendState, Endpoint, Observation, Process, Usage, listening_endpoints
from dispatcher_subprocess.processes import procfs
from dispatcher_subprocess.processes.run import Run
from dispatcher_subprocess.processes.run_record import Journals, Record
from dispatcher_subprocess.stop import Stopper

NOT_YET = "it does not listen yet"
_WAIT = 3.0  # seconds that an observation waits for an operation that holds the agent: a clean-up knows the reason
_LISTEN = b"0A"
_END = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
#: Addresses in /proc/net/tcp and tcp6 that a connection to 127.0.0.1 reaches: any, and loopback.
_REACHED = frozenset(["00000000", "0100007F", "0" * 32, "0000000000000000FFFF00000100007F"])


def listening(port: int, pid: str = "self") -> frozenset[int]:
    """Return the inodes of the sockets that a connection to 127.0.0.1:`port` could reach.

    :param pid: a process whose network namespace is looked at.
    """
    found = set()
    wanted = f"{port:04X}"
    for table in ("tcp", "tcp6"):
        for line in procfs.read(f"/proc/{pid}/net/{table}").splitlines()[1:]:
            fields = line.split()
            host, _, number = fields[1].decode().partition(":")
            if fields[3] == _LISTEN and number == wanted and host in _REACHED:
                found.add(int(fields[9]))
    return frozenset(found)


class Observer:
    """Observes agents; cleans up after one that is found to have ended."""

    def __init__(self, journals: Journals, stopper: Stopper) -> None:
        self._journals, self._stopper = journals, stopper
        #: Token of a run -> listeners on its port that are its own, so that its processes are searched once.
        self._own: dict[str, frozenset[int]] = {}

    def observe(self, record: Record | None) -> Observation:
        """Return the state of an agent, given its journal's content."""
        if record and record.ended is None and self._stopper.run(record).gone:
            # A clean-up holds the lock for a moment, a stop or a start for longer.
            wait = 0.0 if record.stop_requested or record.main is None else _WAIT
            with self._journals.try_locked(record.name, wait) as held:
                if held:
                    record = self._journals.read(record.name)
                    record = record and self._stopper.clean_up(record)
                elif record.main is None:
                    return Observation(state=BackendState.STARTING, spec_hash=record.spec_hash)
        if record is None:
            return Observation(state=BackendState.ABSENT)
        run = self._stopper.run(record)
        found = Observation(state=BackendState.STOPPED, started_at=record.started_at, spec_hash=record.spec_hash)
        if run.gone:
            return replace(found, exit_reason=record.ended or "")
        endpoint, detail = self._endpoint(run)
        if record.helper and not record.helper.lives:
            detail = "the process that carries its network has ended: restart it"
        return replace(
            found,
            state=BackendState.SUSPENDED if self._stopper.is_suspended(record) else BackendState.RUNNING,
            endpoint=endpoint,
            owner_uid=record.owner_uid if endpoint and endpoint.kind == "unix" else None,
            detail=detail,
            oom_kills=run.group.oom_kills() if run.group else 0,
        )

    def _endpoint(self, run: Run) -> tuple[Endpoint | None, str]:
        """Return the endpoint, or None and why the listener is not known to be the agent's."""
        record = run.record
        endpoint = Endpoint.parse(record.endpoint)
        if endpoint.kind != "tcp":
            return endpoint, ""
        listeners = listening(endpoint.port)
        if record.helper and record.init and not listening(endpoint.port, str(record.init.pid)):
            listeners = frozenset()
        if not listeners:
            return None, NOT_YET
        if self._own.get(record.token) != listeners:
            # With a private network the helper listens and forwards.
            pids = [record.helper.pid] if record.helper else [found.pid for found in run.members()]
            if not belongs(listeners, pids) and not _holds_its_port(record.helper):
                return None, "another process listens on its port"
            self._own[record.token] = listeners
        return endpoint, ""

    def forget(self, record: Record) -> None:
        """Drop what is remembered of a run that is over."""
        self._own.pop(record.token, None)


def listeners(run: Run) -> list[str]:
    """Return where the processes of an agent listen, as endpoints seen from inside."""
    pids = [process.pid for process in run.members()]
    own = {what for pid in pids for _, what in procfs.descriptors(pid)}
    return listening_endpoints(pids[0], own) if pids else []


def belongs(inodes: frozenset[int], pids: list[int]) -> bool:
    """Whether every one of some sockets is open in one of some processes."""
    missing = {f"socket:[{inode}]" for inode in inodes}
    for pid in pids:
        missing.difference_update(what for _, what in procfs.descriptors(pid))
    return not missing


def _holds_its_port(helper: Process | None) -> bool:
    """Whether a helper lives whose descriptors an ordinary user may not read.

    It has bound the port before its start is complete, so no other process can bind it while it lives.
    """
    return bool(helper and helper.lives and not os.access(f"/proc/{helper.pid}/fd", os.R_OK))


def usage(run: Run) -> Usage:
    """Return what an agent uses: counted by its control group, else summed over its processes."""
    counted = run.group.usage() if run.group else Usage()
    memory, seconds = counted.memory, counted.cpu_seconds
    if memory is None or seconds is None:
        found = run.members()
        if memory is None:
            memory = sum(_resident(process.pid) for process in found)
        if seconds is None:
            seconds = sum(process.cpu for process in found) / os.sysconf("SC_CLK_TCK")
    return Usage(memory=memory, cpu_seconds=seconds)


def _resident(pid: int) -> int:
    """Return a process's bytes of memory: its proportional share if that may be read, else its resident set."""
    for line in procfs.read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    fields = procfs.read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


class Watcher:
    """Watches processes, children of this one or not, and connections, and calls back once at the end of each.

    The callbacks run in its own thread, within milliseconds (pidfds, epoll).
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._poll = select.epoll()
        self._lock = threading.Lock()
        self._fds: dict[Hashable, int] = {}  # what is watched -> descriptor
        self._ends: dict[int, tuple[Hashable, Callable[[], None]]] = {}  # descriptor -> the same, callback
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="subprocess-watcher", daemon=True)
        self._thread.start()

    def add_process(self, process: Process, ended: Callable[[], None]) -> bool:
        """Watch a process; False when it has ended already."""
        try:
            return self._add(process, process.open, ended)
        except OSError as error:
            self._log.warning("the end of process %d will be detected late: %s", process.pid, error)
            return True

    def add_connection(self, fd: int, ended: Callable[[], None]) -> None:
        """Watch a connection on which nothing arrives, by a copy of its descriptor."""
        self._add(os.fstat(fd).st_ino, lambda: os.dup(fd), ended)

    def _add(self, key: Hashable, open_: Callable[[], int | None], ended: Callable[[], None]) -> bool:
        with self._lock:
            if self._closed or key in self._fds:
                return True
            fd = open_()
            if fd is None:
                return False
            self._fds[key], self._ends[fd] = fd, (key, ended)
            self._poll.register(fd, _END)
        return True

    def close(self) -> None:
        """End the thread; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            for fd, _ in self._poll.poll():
                with self._lock:
                    key, ended = self._ends.pop(fd, (None, None))
                    if ended:
                        del self._fds[key]
                        os.close(fd)
                try:
                    if ended:
                        ended()
                except Exception:
                    self._log.exception("cannot handle the end of a process")
        with self._lock:
            for fd in (*self._ends, self._wake):
                os.close(fd)
            self._poll.close()
