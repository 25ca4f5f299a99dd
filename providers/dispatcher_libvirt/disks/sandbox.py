"""Sandbox for tools that work on disks written by guests.

A disk image is hostile input, and e2fsprogs are large programs in C.  They run in bubblewrap as the agent's user
(for an ordinary user in a user namespace), without network and capabilities, with access to the necessary files
alone, and with limits on memory, processor time and file size.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError

SEARCH = os.pathsep.join(["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
CODE = "/code"
_MEMORY = 2 << 30
_MAX_OUTPUT = 1 << 20
_TICK = 0.4

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host and its path in the sandbox."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Exit code and output of a tool, both streams together."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


def tool(name: str) -> str:
    """Return the path of a program of the host.

    :raises ProviderError: it is not installed.
    """
    path = shutil.which(name, path=SEARCH)
    if path is None:
        packages = {
            "bwrap": "bubblewrap",
            "qemu-img": "qemu-utils",
            "setpriv": "util-linux",
            "prlimit": "util-linux",
        }
        raise ProviderError(
            f"The program {name} is missing on this host",
            why="the provider libvirt needs it for machines' disks",
            fix=f"install it (Debian: {packages.get(name, 'e2fsprogs')})",
        )
    return path


def run(
    argv: Sequence[str],
    *,
    binds: Sequence[Bind],
    user: tuple[int, int] | None,
    deadline: Deadline,
    tick: Tick | None = None,
    line: Callable[[str], None] | None = None,
    file_size: int | None = None,
    read_all: bool = False,
) -> Result:
    """Run a program in the sandbox to its end.

    :param user: host user and group id to run as, None for this user (in a user namespace).
    :param tick: called about twice a second; an exception from it kills the program.
    :param line: called with each line of output.
    :param read_all: as root, let it read files that their owner may not (it still writes only its own).
    :raises DeadlineExceeded: it took too long; :raises ProviderError: a tool of the host is missing.
    """
    seconds = max(1, round(min(deadline.remaining(), 6 * 3600)))
    limits = ["--core=0", "--nofile=256", f"--as={_MEMORY}", f"--cpu={seconds + 1}"]
    if file_size is not None:
        limits.append(f"--fsize={file_size}")
    command = [tool("prlimit"), *limits, "--", *_bwrap(binds, user, read_all=read_all), *argv]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={"LC_ALL": "C.UTF-8", "PATH": SEARCH},
    ) as process:
        try:
            output = _follow(process, deadline, tick, line)
            return Result(process.wait(), output)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def python(program: str) -> tuple[list[str], list[Bind]]:
    """Return argv and binds that run one of this package's programs with Python's standard library.

    :param program: file name of the program in this package.
    """
    base, target = Path(sys.base_prefix), f"{CODE}/{program}"
    binds = [Bind(Path(__file__).with_name(program), target)]
    if not base.is_relative_to("/usr") and base != Path("/"):
        binds.append(Bind(base, str(base)))
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return [executable, "-I", "-S", "-B", target], binds


def _bwrap(binds: Sequence[Bind], user: tuple[int, int] | None, *, read_all: bool) -> list[str]:
    command = [tool("bwrap"), "--die-with-parent", "--new-session", "--clearenv", "--setenv", "LC_ALL", "C.UTF-8"]
    if user is None:
        command.append("--unshare-all")
    else:
        command += ["--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"]
    command += [*_system(), "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/"]  # noqa: S108 - the sandbox's own
    for bind in binds:
        for parent in reversed(Path(bind.target).parents[:-1]):
            if not str(parent).startswith("/usr"):
                command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--bind" if bind.writable else "--ro-bind", str(bind.source), bind.target]
    if user is not None and read_all:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_DAC_READ_SEARCH"]
    command.append("--")
    if user is not None and not read_all:
        uid, gid = user
        command += [tool("setpriv"), f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
        command += ["--bounding-set=-all", "--inh-caps=-all", "--"]
    return command


def _system() -> Iterator[str]:
    yield from ("--ro-bind", "/usr", "/usr")
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", os.readlink(path), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    yield from ("--perms", "0755", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    yield from ("--dev-bind", "/dev/null", "/etc/mtab")  # resize2fs reads it


def _follow(
    process: subprocess.Popen[bytes], deadline: Deadline, tick: Tick | None, line: Callable[[str], None] | None
) -> str:
    """Read the program's output until it ends, and return the last part of it."""
    assert process.stdout is not None
    kept, rest = b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if deadline.expired:
                raise DeadlineExceeded(
                    "A tool did not finish with a machine's disk in time",
                    fix="try again, with more time for large disks",
                )
            ready = selector.select(min(_TICK, deadline.remaining()))
            if tick:
                tick()
            if not ready:
                continue
            block = os.read(process.stdout.fileno(), 65536)
            if not block:
                return kept.decode(errors="replace")
            kept = (kept + block)[-_MAX_OUTPUT:]
            if line:
                *lines, rest = (rest + block)[-_MAX_OUTPUT:].split(b"\n")
                for one in lines:
                    line(one.decode(errors="replace"))
