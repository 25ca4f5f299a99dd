"""Starting the processes of an agent, and finding, signalling and killing all of them.

A process that forked twice, made its own session and namespaces and closed its descriptors is still found by the
agent's control group, pid namespace or host user id.  Without any of these, an ordinary user's agent is found by
parenthood, its output and a random token in the environment, which a process can evade; `explain` reports that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from dispatcher.plugin import Deadline
from dispatcher_subprocess import procfs
from dispatcher_subprocess.cgroups import Group
from dispatcher_subprocess.errors import failed
from dispatcher_subprocess.host import which
from dispatcher_subprocess.journal import Process, Record, sandbox_status

TOKEN = "DISPATCHER_RUN"  # noqa: S105  the variable that holds a run's token
_ROUNDS = 64  # of killing against forks; each finds what the last one missed
_OWNER = 0xB701  # the request NS_GET_USERNS of ioctl_nsfs(2)
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
    umask: int,
    cwd: str,
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
    found = procfs.stat(process.pid)
    return Process(pid=process.pid, start=found.start if found else 0)


def reap(process: Process) -> int | None:
    """Reap a child that ends; return its exit code (-N: killed by signal N), None if it is not our child.

    Its first thread may be dead while others still run: so wait a moment.
    """
    found = procfs.stat(process.pid)
    if found is None or found.start != process.start:
        return None  # another process, perhaps another child, has its pid now
    end = time.monotonic() + _DYING
    while True:
        try:
            done, status = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def wait_readable(fd: int, deadline: Deadline) -> bool:
    """Wait until a descriptor can be read or is at its end; False if the deadline comes first."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(deadline.remaining() * 1000))


def main_lives(record: Record) -> bool:
    """Whether the app itself, its first process, still executes."""
    if record.main is None:
        return False
    return procfs.lives(record.main.pid, record.main.start) or app_without_main(record) is not None


def app_without_main(record: Record) -> Process | None:
    """Return the app's first process if only the outer bwrap was killed, as the sandbox runs on."""
    if record.init is None or sandbox_status(record).exit_code is not None:
        return None
    if not procfs.lives(record.init.pid, record.init.start):
        return None
    for pid in procfs.children(record.init.pid):
        found = procfs.stat(pid)
        if found and not found.dead and procfs.inner_pid(pid) == 2:  # the init's own first child
            return Process(pid=pid, start=found.start)
    return None


def members(record: Record, group: Group | None) -> list[procfs.Stat]:
    """Return the living processes of an agent, without bubblewrap's own two and the network's helper."""
    found = group.procs() if group else set()
    if record.init:
        # Orphans become children of their namespace's init, so all processes stay below it.
        if not group and procfs.lives(record.init.pid, record.init.start):
            found |= procfs.descendants([record.init.pid])
    elif not record.sandboxed:
        found |= _unconfined(record)
    own = {process.pid for process in (record.init, record.helper) if process}
    if record.sandboxed and record.main:
        own.add(record.main.pid)
    living = (procfs.stat(pid) for pid in found - own - {os.getpid()})
    return [process for process in living if process and not process.dead]


def _unconfined(record: Record) -> set[int]:
    if os.geteuid() == 0 and record.uid >= 1000:
        return {pid for pid in procfs.pids() if record.uid in procfs.uids(pid)}
    mark = f"{TOKEN}={record.token}".encode()
    roots = {record.main.pid} if record.main and procfs.lives(record.main.pid, record.main.start) else set()
    for pid in procfs.pids():
        if mark in (procfs.read(f"/proc/{pid}/environ") or b"").split(b"\0") or procfs.writes_to(pid, record.pipe):
            roots.add(pid)
    return procfs.descendants(roots) if roots else roots


def signal_all(record: Record, group: Group | None, number: int) -> int:
    """Send a signal to every process of an agent; return how many got it."""
    return sum(procfs.send(process.pid, process.start, number) for process in members(record, group))


def signal_at_once(record: Record, number: int) -> bool:
    """Send a signal to every process of an agent at once, which no fork evades; False if that is impossible.

    The kernel's ``kill(-1)`` reaches all processes that the caller may signal: a helper inside the agent's pid
    namespace, or with its user id, may signal just those.
    """
    shell = ["/bin/sh", "-c", f"kill -{int(number)} -1"]
    fds: list[int] = []
    with contextlib.ExitStack() as stack:
        if record.init:
            try:
                pidfd = procfs.open_pidfd(record.init.pid, record.init.start)
                if pidfd is None:
                    return True  # it has ended
                stack.callback(os.close, pidfd)
                space = os.open(f"/proc/{record.init.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, space)
                fds = [space]
                if os.geteuid() != 0:  # the owner's user namespace, as the agent's own has no rights over it
                    fds.append(fcntl.ioctl(space, _OWNER))
                    stack.callback(os.close, fds[1])
                if not procfs.lives(record.init.pid, record.init.start):
                    return True
            except OSError:
                return False
            inside = [f"--{kind}=/proc/self/fd/{fd}" for kind, fd in zip(("pid", "user"), fds, strict=False)]
            command = [which("nsenter"), *inside, *(["--preserve-credentials"] if len(fds) > 1 else []), *shell]
        elif os.geteuid() == 0 and record.uid >= 1000:
            command = [which("setpriv"), f"--reuid={record.uid}", "--clear-groups", *shell]
        else:
            return False
        try:
            subprocess.run(
                command, check=False, capture_output=True, timeout=_AT_ONCE, env={}, cwd="/", pass_fds=fds
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return True


def kill(record: Record, group: Group | None, expired: Callable[[], bool]) -> bool:
    """Kill every process of an agent; False if one was still alive at `expired`."""
    if record.init:
        procfs.send(record.init.pid, record.init.start, 9)  # the kernel kills its whole pid namespace with it
    elif record.main is None and record.sandboxed:
        _kill_interrupted(record)
    if group:
        group.kill()
    elif not record.init:
        signal_at_once(record, 9)  # a list of processes is outdated while they fork
    if record.helper:
        procfs.send(record.helper.pid, record.helper.start, 9)
    pause = 0.001
    for _ in range(_ROUNDS):
        rest = members(record, group)
        for process in rest:
            procfs.send(process.pid, process.start, 9)
        if not rest and not _any_lives([record.init, record.main, record.helper]):
            return True
        if record.main:
            procfs.send(record.main.pid, record.main.start, 9)
        if expired():
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return False


def _kill_interrupted(record: Record) -> None:
    """Kill the sandbox of a start that the manager's end interrupted: bubblewrap has its status file open."""
    for pid in procfs.pids():
        if pid != os.getpid() and record.status in procfs.open_paths(pid):
            for found in map(procfs.stat, [*procfs.children(pid), pid]):
                if found:
                    procfs.send(found.pid, found.start, 9)
    status = sandbox_status(record)
    if status.child and status.pidns and procfs.namespace(status.child, "pid") == status.pidns:
        found = procfs.stat(status.child)
        if found:
            procfs.send(found.pid, found.start, 9)


def _any_lives(processes: Iterable[Process | None]) -> bool:
    return any(process and procfs.lives(process.pid, process.start) for process in processes)


def wait_end(record: Record, group: Group | None, seconds: float, on_wait: Callable[[], None]) -> None:
    """Wait until an agent has ended, at most `seconds`, and only briefly once its first process has ended.

    :param on_wait: called several times a second; may raise.
    """
    end = time.monotonic() + seconds
    with _watched([record.init, record.main]) as wait:
        while (left := end - time.monotonic()) > 0:
            on_wait()
            if not main_lives(record):
                end = min(end, time.monotonic() + _AFTER_MAIN)
                if not members(record, group):
                    return
                time.sleep(min(0.02, left))
            else:
                wait(min(0.2, left))


@contextlib.contextmanager
def _watched(processes: Iterable[Process | None]) -> Iterator[Callable[[float], None]]:
    """Yield a function that waits until one of the processes ends."""
    poll = select.poll()
    fds: list[int] = []
    try:
        for process in processes:
            with contextlib.suppress(OSError):  # without a descriptor the caller polls
                fd = procfs.open_pidfd(process.pid, process.start) if process else None
                if fd is not None:
                    fds.append(fd)
                    poll.register(fd, select.POLLIN)

        def wait(seconds: float) -> None:
            poll.poll(seconds * 1000)

        yield wait
    finally:
        for fd in fds:
            os.close(fd)


def output_of(record: Record) -> int | None:
    """Return a new read end of an agent's output pipe, None if it cannot be opened.

    It comes from bubblewrap's processes or the app's first one, as the app may have closed or replaced its own.
    """
    for process in (record.main, record.init):
        if process and procfs.lives(process.pid, process.start):
            try:
                fd = os.open(f"/proc/{process.pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
    return None
