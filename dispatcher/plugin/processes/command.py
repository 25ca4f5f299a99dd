"""Programs that a provider runs: under a deadline and `progress`, with errors of the public tree."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, ProviderError, Unavailable
from dispatcher.plugin.provider import Progress, no_progress

#: Where programs of the system are: users' own directories are not searched.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STEP = 0.2  # seconds between calls of `progress`


def find_program(name: str) -> str:
    """Return the path of a program of the system, "" if it is absent."""
    return shutil.which(name, path=SYSTEM_PATH) or ""


def run_command(
    command: Sequence[str],
    what: str,
    *,
    deadline: Deadline,
    progress: Progress = no_progress,
    stdin: bytes | int = b"",
    stdout: int = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
    fds: Sequence[int] = (),
) -> bytes:
    """Run a program, in a session of its own and in ``/``, and return what it writes to its standard output.

    Nothing of this process's environment reaches it.  It is killed, and its descendants of the same process group
    too, when the deadline passes or `progress` raises.

    :param what: the error if it fails, such as "Cannot list the containers"; also the step for `progress`.
    :param stdin: its standard input, content or a descriptor; :param stdout: a descriptor for its output.
    :param environment: by default ``PATH`` and ``LC_ALL`` alone; :param fds: descriptors that it inherits.
    :raises DeadlineExceeded: it did not end in time; :raises Unavailable: it cannot be started.
    :raises ProviderError: it ended with another code than 0; `why` is the last line of its errors.
    """
    program = find_program(command[0])
    if not program:
        raise Unavailable(what, why=f"there is no program {command[0]!r}", fix="install it")
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.PIPE if isinstance(stdin, bytes) else stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8"} if environment is None else dict(environment),
            cwd="/",
            pass_fds=fds,
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(what, why=f"{program}: {error.strerror}", fix="repair or install it again") from error
    content = stdin if isinstance(stdin, bytes) else None
    with process:
        try:
            output, errors = _communicate(process, content, what, deadline, progress)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        name = os.path.basename(program)
        raise ProviderError(what, why=f"{name}: {last_line(errors) or f'ended with {process.returncode}'}")
    return output or b""


def _communicate(
    process: subprocess.Popen[bytes], stdin: bytes | None, what: str, deadline: Deadline, progress: Progress
) -> tuple[bytes, bytes]:
    while True:
        try:
            return process.communicate(stdin, timeout=min(_STEP, deadline.remaining()))
        except subprocess.TimeoutExpired as error:
            stdin = None  # what is not written yet, it still knows
            if deadline.expired:
                raise DeadlineExceeded(what, why="it takes too long", fix="try again") from error
            progress(what)


def last_line(output: bytes) -> str:
    """Return the last line of a program's output, safe to print; "" where there is none."""
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return "".join(char if char.isprintable() else "?" for char in lines[-1])[:500] if lines else ""
