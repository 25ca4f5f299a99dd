"""Starting one agent: descriptors, the one fork, and the gate that holds it until its limits are set.

What is started waits at a gate (bubblewrap's ``--block-fd``, or a line on standard input without it) until the
manager has put it into its control group and set its limits: nothing of the app runs outside of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import time
from collections.abc import Mapping, Sequence

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError
from dispatcher_subprocess import procfs
from dispatcher_subprocess.record import Process

_PIPE = 32768  # bytes that surely fit into a pipe that nobody reads yet
_DYING = 1.0  # seconds that a killed process may take to be gone
_AGENT_OOM = 100  # agents go before the host's own services when memory is short


def memory_file(name: str, content: bytes) -> int:
    """Return the descriptor of a file in memory, ready to be read."""
    fd = os.memfd_create(name)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def input_pipe(content: bytes) -> tuple[int, int]:
    """Return a pipe's read end for standard input, and its write end, `content` being in it already.

    :raises ProviderError: there is too much.
    """
    if len(content) > _PIPE:
        raise ProviderError(
            "The credentials are too long", why=f"{len(content)} bytes, at most {_PIPE} are handed on"
        )
    read_end, write_end = os.pipe()
    if content:
        os.write(write_end, content)
    return read_end, write_end


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
        raise ProviderError("Cannot start the agent", why=str(error)) from error
    process.returncode = 0  # it is reaped by `reap`: this object must not wait for it, nor warn when it goes
    found = procfs.stat(process.pid)
    return Process(pid=process.pid, start=found.start if found else 0)


def reap(process: Process) -> int | None:
    """Reap a dying child; return its exit code (-N: killed by signal N), None when it is no child of ours.

    Its first thread may look dead while others are still at it: so wait a little.
    """
    found = procfs.stat(process.pid)
    if found is None or found.start != process.start:
        return None  # gone; whoever has its pid now, perhaps another child of ours, is none of this
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


def read_info(fd: int, deadline: Deadline) -> tuple[int, int]:
    """Return the pid of the sandbox's init and the inode of its pid namespace, from bubblewrap's ``--info-fd``.

    :raises ProviderError: bubblewrap ended without a word; :raises DeadlineExceeded: it says nothing for too long.
    """
    text = b""
    while True:
        if not wait_readable(fd, deadline):
            raise DeadlineExceeded("bubblewrap does not get on")
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        text += chunk
    try:
        info = json.loads(text)
        return int(info["child-pid"]), int(info.get("pid-namespace", 0))
    except (ValueError, KeyError) as error:
        raise ProviderError("bubblewrap ended before the sandbox was made") from error


def wait_readable(fd: int, deadline: Deadline) -> bool:
    """Wait until a descriptor can be read (or is at its end); False when the deadline comes first."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(deadline.remaining() * 1000))


def limit(pid: int, limits: Mapping[int, int | None], nice: int) -> None:
    """Set resource limits (soft and hard alike, None leaves one alone) and priority of a waiting process.

    Who may not raise a hard limit gives the agent that much: an ordinary user, and a root without CAP_SYS_RESOURCE
    as in many containers.  It is never more than what the app asked for.

    :raises ProviderError: the kernel refuses.
    """
    try:
        for kind, value in limits.items():
            if value is not None:
                _limit(pid, kind, value)
        if nice:
            os.setpriority(os.PRIO_PROCESS, pid, nice)
    except OSError as error:
        raise ProviderError(
            "Cannot limit the agent",
            why=error.strerror or str(error),
            fix="give the manager CAP_SYS_RESOURCE and CAP_SYS_NICE (a container: --cap-add)",
        ) from error
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(_AGENT_OOM).encode())
        finally:
            os.close(fd)


def _limit(pid: int, kind: int, value: int) -> None:
    """Set one limit, or the hard limit there is when that is lower and may not be raised."""
    try:
        resource.prlimit(pid, kind, (value, value))
    except PermissionError:
        hard = resource.prlimit(pid, kind)[1]
        if hard == resource.RLIM_INFINITY or hard >= value:
            raise
        resource.prlimit(pid, kind, (hard, hard))


def drain(fd: int) -> str:
    """Return what is in a pipe now, for an error message: its last line, safe to print."""
    os.set_blocking(fd, False)
    try:
        text = os.read(fd, 65536)
    except OSError:
        return ""
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return "".join(char if char.isprintable() else "?" for char in lines[-1])[:500] if lines else ""
