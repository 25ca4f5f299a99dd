"""The shim itself: runs an agent's command, writes its output to a rotated log, records its exit.  See `Shim`.

Run as ``python -I -S shim_main.py ROOT PLAN READY``: ROOT is the directory that holds the package `dispatcher`,
PLAN the descriptor of what to do, READY that of a pipe for the answer: "started", or why not.  There is one for
each agent, so it imports few modules: 9 MB resident, 3 of them its own.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
import time

if __name__ == "__main__":
    sys.path.append(sys.argv[1])

from dispatcher.plugin.processes.rotated_log import RotatedLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CHUNK = 65536
RATE = 16 << 20  # bytes of output per second: a flood costs neither the processor nor the disk
DRAIN, MOST = 0.02, 1 << 20  # seconds and bytes for the last output of a command that has ended
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_DEFAULT_SIGNALS = (13, 25)  # SIGPIPE and SIGXFSZ, which Python ignores


def main() -> None:
    """Take the plan, leave the caller, run."""
    plan_fd, ready = map(int, sys.argv[2:4])
    with open(plan_fd, "rb") as file:
        plan = marshal.loads(file.read())  # noqa: S302  the caller wrote it into memory
    os.set_inheritable(ready, False)
    if os.fork():  # so that the manager need not reap the shim
        os._exit(0)
    log = RotatedLog(plan["log"], plan["size"], plan["files"])
    output, target, fault = begin(plan, log)
    if target:
        write(plan["directory"], "process", stamp(plan["boot"], target, os.getpid()))
    try:
        os.write(ready, fault.encode() or b"started")
    except BrokenPipeError:  # the manager has ended; the next one finds the agent
        pass
    os.close(ready)
    if target:
        carry(output, target, log, plan["directory"])


def begin(plan: dict[str, Any], log: RotatedLog) -> tuple[int, int, str]:
    """Start the command; return the read end of its output, the process to watch or 0, and why it did not start.

    With a pid file the command itself ends, and the process that it names is the one to watch.
    """
    if plan["pid_file"]:
        import ctypes

        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # to become the parent of that process
    output, write_end = os.pipe()
    os.fchmod(write_end, 0o622)  # an app that is another user may open /dev/stdout by name
    own = os.umask(plan["umask"])
    try:
        os.chdir(plan["cwd"])
        child = os.posix_spawn(
            plan["command"][0],
            plan["command"],
            plan["environment"],
            file_actions=[(os.POSIX_SPAWN_DUP2, write_end, fd) for fd in (1, 2)],
            setsid=not plan["pid_file"],  # a start that is given up ends with the shim's process group
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
    except OSError as error:
        return output, 0, f"{plan['command'][0]}: {error.strerror}"
    finally:
        os.umask(own)
        os.chdir("/")
        os.close(write_end)
        os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), 0)  # the credentials are the app's alone
    if not plan["pid_file"]:
        return output, child, ""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not code:
        with open(plan["pid_file"], encoding="ascii") as file:
            return output, int(file.read()), ""
    last = drain(output, log).decode("utf-8", "replace").strip().splitlines()
    return output, 0, last[-1] if last else f"{plan['command'][0]} ended with {code}"


def drain(output: int, log: RotatedLog) -> bytes:
    """Write to the log, and return, what an ended command has written; a descendant may have the pipe open."""
    poll = select.poll()
    poll.register(output, select.POLLIN)
    text = b""
    while len(text) < MOST and poll.poll(DRAIN * 1000) and (data := os.read(output, CHUNK)):
        log.write(data)
        text += data
    return text


def carry(output: int, target: int, log: RotatedLog, directory: str) -> None:
    """Write the output to the log and record the exit, until both have ended."""
    ended = os.pidfd_open(target)
    poll = select.poll()
    for fd in (output, ended):
        poll.register(fd, select.POLLIN)
    todo = {output, ended}
    while todo:
        for fd, _ in poll.poll():
            if fd == output and (data := os.read(output, CHUNK)):
                log.write(data)
                time.sleep(len(data) / RATE)
                continue
            if fd == ended:
                drain(output, log)  # who reads the exit finds the last output too
                code = os.waitstatus_to_exitcode(os.waitpid(target, 0)[1])
                write(directory, "exit", f'{{"code": {code}, "time": {time.time()}}}')
            todo.remove(fd)
            poll.unregister(fd)


def stamp(boot: str, *pids: int) -> str:
    """Return JSON: the boot, and pid and start time of processes."""
    known = []
    for pid in pids:
        with open(f"/proc/{pid}/stat", "rb") as file:
            known.append([pid, int(file.read().rpartition(b")")[2].split()[19])])
    return f'{{"boot": "{boot}", "processes": {known}}}'


def write(directory: str, name: str, text: str) -> None:
    """Replace a file as a whole; without its directory the agent is being removed."""
    new = f"{directory}/{name}.new"
    try:
        with open(new, "w", encoding="ascii") as file:
            file.write(text)
        os.rename(new, f"{directory}/{name}")
    except OSError:
        pass


if __name__ == "__main__":
    main()
