"""Starting the processes of an agent, and finding, signalling and killing all of them.

A process that forked twice, made its own session and namespaces and closed its descriptors is still found by the
agent's control group, pid namespace or host user id.  Without any of these, an ordinary user's agent is found by
parenthood, its output and a random token in the environment, which a process can evade; `explain` reports that.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dispatcher.plugin import Deadline, Process, ProcessStat, find_program, process_stat
from dispatcher_subprocess.errors import failed
from dispatcher_subprocess.processes import procfs
from dispatcher_subprocess.processes.cgroups import Group
from dispatcher_subprocess.processes.run_record import Record

TOKEN = "DISPATCHER_RUN"  # noqa: S105  the variable that holds a run's token
_ROUNDS = 64  # of killing against forks; each finds what the last one missed
_AT_ONCE = 10.0  # seconds for a signal to all processes at once
_AFTER_MAIN = 1.0  # seconds for the other processes after the app's first one has ended
_DYING = 1.0  # seconds until a killed process is gone


def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdin: int,
    output: int,
    inherited: Sequence[int],
    umask: int = 0o077,
    cwd: str = "/",
) -> Process:
    """Start a program in a session of its own and return at once.

    :raises ProviderError: the kernel refuses.
    """
    try:
        process = subprocess.Popen(  # without preexec_fn, so that vfork is used
            command,
            stdin=stdin,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            env=dict(environment),
            umask=umask,
            cwd=cwd,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise failed("Cannot start the agent", error) from error
    process.returncode = 0  # `reap` reaps it: this object must neither wait for it nor warn at its end
    found = process_stat(process.pid)
    return Process(process.pid, found.start if found else 0)


def reap(process: Process) -> int | None:
    """Reap a child that ends; return its exit code (-N: killed by signal N), None if it is not our child.

    Its first thread may be dead while others still run: so wait a moment.
    """
    found = process_stat(process.pid)
    if found is None or found.start != process.start:
        return None  # another process, perhaps another child, has its pid now
    end = time.monotonic() + _DYING
    while True:
        try:
            pid, code = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid:
            return os.waitstatus_to_exitcode(code)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def wait_readable(fd: int, deadline: Deadline) -> bool:
    """Wait until a descriptor can be read or is at its end; False if the deadline comes first."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(deadline.remaining() * 1000))


@dataclass(frozen=True, slots=True)
class Run:
    """The processes of an agent's latest run: its record and its control group, None without control groups."""

    record: Record
    group: Group | None

    @property
    def gone(self) -> bool:
        """Whether the app does not run (or never did)."""
        record = self.record
        if record.boot != procfs.boot_id() or record.ended is not None or record.main is None:
            return True
        return not record.main.lives and self.app_without_main() is None

    def app_without_main(self) -> Process | None:
        """Return the app's first process if only the outer bwrap was killed, as the sandbox runs on."""
        init = self.record.init
        if init is None or "exit-code" in self.record.sandbox_status() or not init.lives:
            return None
        for found in filter(None, map(process_stat, procfs.children(init.pid))):
            # The init's own first child.
            if not found.dead and procfs.status(found.pid, b"NSpid")[-1:] == [2]:
                return found.process
        return None

    def members(self) -> list[ProcessStat]:
        """Return the living processes of an agent, without bubblewrap's own two and the network's helper."""
        record = self.record
        found = self.group.procs() if self.group else set()
        if record.init:
            # Orphans become children of their namespace's init, so all processes stay below it.
            if not self.group and record.init.lives:
                found |= procfs.descendants([record.init.pid])
        elif not record.sandboxed:
            found |= self._unconfined()
        outer = record.main if record.sandboxed else None
        own = {process.pid for process in (outer, record.init, record.helper) if process}
        living = map(process_stat, found - own - {os.getpid()})
        return [process for process in living if process and not process.dead]

    def _unconfined(self) -> set[int]:
        record = self.record
        if os.geteuid() == 0 and record.uid >= 1000:
            return {pid for pid in procfs.pids() if record.uid in procfs.status(pid, b"Uid")}
        mark, pipe = f"{TOKEN}={record.token}".encode(), f"pipe:[{record.pipe}]"
        roots = {record.main.pid} if record.main and record.main.lives else set()
        for pid in procfs.pids():
            if mark in procfs.read(f"/proc/{pid}/environ").split(b"\0") or any(
                what == pipe for fd, what in procfs.descriptors(pid) if fd in {1, 2}
            ):
                roots.add(pid)
        return procfs.descendants(roots) if roots else roots

    def signal(self, number: int) -> None:
        """Send a signal to every process."""
        for process in self.members():
            process.send(number)

    def signal_at_once(self, number: int) -> None:
        """Send a signal to every process at once, which no fork evades, if that is possible.

        The kernel's ``kill(-1)`` reaches all processes that the caller may signal: a helper inside the agent's pid
        namespace, or with its user id, may signal just those.
        """
        record = self.record
        shell = ["/bin/sh", "-c", f"kill -{int(number)} -1"]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, subprocess.TimeoutExpired):
            fds = []
            if record.init:
                fds = [os.open(f"/proc/{record.init.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)]
                stack.callback(os.close, fds[0])
                command = [find_program("nsenter"), f"--pid=/proc/self/fd/{fds[0]}"]
                if os.geteuid() != 0:  # the owner's user namespace, as the agent's own has no rights over it
                    fds.append(procfs.owner(fds[0]))
                    stack.callback(os.close, fds[1])
                    command += [f"--user=/proc/self/fd/{fds[1]}", "--preserve-credentials"]
                if not record.init.lives:
                    return
            elif os.geteuid() == 0 and record.uid >= 1000:
                command = [find_program("setpriv"), f"--reuid={record.uid}", "--clear-groups"]
            else:
                return
            subprocess.run(
                [*command, *shell],
                check=False,
                capture_output=True,
                timeout=_AT_ONCE,
                env={},
                cwd="/",
                pass_fds=fds,
            )

    def kill(self, deadline: Deadline) -> bool:
        """Kill every process; False if one was still alive at the deadline."""
        record = self.record
        own = [process for process in (record.init, record.main, record.helper) if process]
        if record.init:
            record.init.send(9)  # the kernel kills its whole pid namespace with it
        elif record.main is None and record.sandboxed:
            self._kill_interrupted()
        if self.group:
            self.group.kill()
        elif not record.init:
            self.signal_at_once(9)  # a list of processes is outdated while they fork
        if record.helper:
            record.helper.send(9)
        pause = 0.001
        for _ in range(_ROUNDS):
            rest = self.members()
            for process in rest:
                process.send(9)
            if not rest and not any(process.lives for process in own):
                return True
            if record.main:
                record.main.send(9)
            if deadline.expired:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.1)
        return False

    def _kill_interrupted(self) -> None:
        """Kill the sandbox of a start that the manager's end interrupted: bubblewrap has its status file open."""
        targets = [
            process
            for pid in procfs.pids()
            if pid != os.getpid() and any(what == self.record.status for _, what in procfs.descriptors(pid))
            for process in [*procfs.children(pid), pid]
        ]
        status = self.record.sandbox_status()
        child = status.get("child-pid", 0)
        if child and procfs.namespace(child, "pid") == status.get("pid-namespace"):
            targets.append(child)
        for found in filter(None, map(process_stat, targets)):
            found.send(9)

    def wait_end(self, seconds: float, on_wait: Callable[[], None]) -> None:
        """Wait until the agent has ended, at most `seconds`, and only briefly once its first process has ended.

        :param on_wait: called several times a second; may raise.
        """
        end = time.monotonic() + seconds
        with _watched([self.record.init, self.record.main]) as poll:
            while (left := end - time.monotonic()) > 0:
                on_wait()
                if self.gone:
                    end = min(end, time.monotonic() + _AFTER_MAIN)
                    if not self.members():
                        return
                    time.sleep(min(0.02, left))
                else:
                    for fd, _ in poll.poll(min(0.2, left) * 1000):
                        poll.unregister(fd)  # it would be ready from now on, while the other one still ends

    def output(self) -> int | None:
        """Return a new read end of the agent's output pipe, None if it cannot be opened.

        It is from bubblewrap's processes or the app's first one, as the app may have closed or replaced its own.
        """
        for process in (self.record.main, self.record.init):
            if process and process.lives:
                with contextlib.suppress(OSError):
                    fd = os.open(f"/proc/{process.pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    if stat.S_ISFIFO(os.fstat(fd).st_mode):
                        return fd
                    os.close(fd)
        return None


@contextlib.contextmanager
def _watched(processes: Iterable[Process | None]) -> Iterator[select.poll]:
    """Yield a poll object that returns when one of the processes ends."""
    poll = select.poll()
    fds: list[int] = []
    try:
        for process in filter(None, processes):
            with contextlib.suppress(OSError):  # without a descriptor the caller polls
                fd = process.open()
                if fd is not None:
                    fds.append(fd)
                    poll.register(fd, select.POLLIN)
        yield poll
    finally:
        for fd in fds:
            os.close(fd)
