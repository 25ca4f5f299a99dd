"""A shim: the parent of one agent's process that outlives the manager (see `Shim`)."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dispatcher.plugin.deadline import Deadline, boot_id
from dispatcher.plugin.errors import DeadlineExceeded, ProviderError, Unavailable
from dispatcher.plugin.model import BackendState
from dispatcher.plugin.processes import shim_main
from dispatcher.plugin.processes.process import Process, exit_reason, process_stat
from dispatcher.plugin.provider import Progress, no_progress

LOG_SIZE, LOG_FILES = 1024 * 1024, 4
_RECORD, _PROCESS, _EXIT = "record", "process", "exit"
_ROOT = Path(__file__).parents[3]  # where the package `dispatcher` is
_FAILED = "Cannot start the agent"
_STEP = 0.2  # seconds between calls of `progress`
_PIPE = 32768  # bytes that a pipe holds without a reader
_ABORT = 1.0  # seconds for a command to end by itself when its start is given up
_RECORDED = 1.0  # seconds from the end of an app until its exit is recorded


class Shim:
    """A small process between the manager and one agent, and what is recorded of that agent.

    It starts the agent's command, writes its output to a rotated log, and records its exit code.  It is no child
    of the manager: the agent, its log and its exit code survive the manager's end, and any instance finds them
    again in `directory`.  (A systemd unit of the manager needs ``KillMode=process``.)

    :param directory: the agent's own, private and kept across reboots, such as one in `ProviderContext.state_dir`;
        it has the files ``record``, ``process`` and ``exit``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(
        self,
        command: Sequence[str],
        record: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        log: Path,
        deadline: Deadline,
        progress: Progress = no_progress,
        cwd: Path | str = "/",
        umask: int = 0o007,
        stdin: bytes = b"",
        pid_file: Path | None = None,
        log_size: int = LOG_SIZE,
        log_files: int = LOG_FILES,
    ) -> Process:
        """Start a command and return the agent's first process.

        After an exception nothing is recorded, and the command's process group has ended.  Processes that left the
        group, and whatever the command made elsewhere, can remain.

        :param record: what the provider must know of the agent later, JSON; see the property `record`.
        :param environment: the whole environment; its ``PATH`` finds the program.  If the command runs as root at
            first (``unshare``, ``setpriv``), do not pass the app's variables here but by ``env -i`` behind it: the
            agent can write to the files that its ``PATH`` or ``LD_PRELOAD`` names.
        :param log: the log file, read by `read_lines` and removed by `remove_logs`; :param log_size: bytes at
            which it is rotated; :param log_files: number of files, the current one included.
        :param umask: 007 lets the proxy's group connect to a socket in `AgentSpec.run_dir`.
        :param stdin: its standard input, before end of file.
        :param pid_file: for a command that itself ends and leaves the agent, as container runtimes do: the file to
            which it writes the agent's pid.
        :raises ProviderError: it does not start; `why` is the last line of its output.
        :raises DeadlineExceeded: it did not start in time; :raises Cancelled: by `progress`.
        """
        program = shutil.which(command[0], path=environment.get("PATH", os.defpath))
        if not program:
            raise ProviderError(_FAILED, why=f"there is no program {command[0]!r}", fix="install it")
        if len(stdin) > _PIPE:
            raise ProviderError("The credentials are too long", why=f"{len(stdin)} bytes, the limit is {_PIPE}")
        self.remove()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        starter = process_stat(os.getpid())
        known = {"boot": boot_id(), "starter": [starter.pid, starter.start] if starter else [0, 0]}
        self._write({**known, "record": dict(record)})
        plan = {
            "command": [os.path.abspath(program), *command[1:]],
            "environment": dict(environment),
            "cwd": os.fspath(cwd),
            "umask": umask,
            "pid_file": os.fspath(pid_file or ""),
            "directory": os.fspath(self.directory),
            "log": os.fspath(log),
            "size": log_size,
            "files": log_files,
            "boot": known["boot"],
        }
        try:
            answer = self._launch(marshal.dumps(plan), stdin, deadline, progress)
            process = self.process
            if process is None:
                raise ProviderError(_FAILED, why=answer.removesuffix("started") or "its shim has ended")
            return process
        except BaseException:
            self.remove()
            raise

    def _launch(self, plan: bytes, stdin: bytes, deadline: Deadline, progress: Progress) -> str:
        """Start the shim and return its answer."""
        with contextlib.ExitStack() as ours:
            ready, told = os.pipe()
            ours.callback(os.close, ready)
            with contextlib.ExitStack() as passed:
                passed.callback(os.close, told)
                memory = os.memfd_create("plan")
                passed.callback(os.close, memory)
                os.write(memory, plan)
                os.lseek(memory, 0, os.SEEK_SET)
                source, content = os.pipe()
                passed.callback(os.close, source)
                passed.callback(os.close, content)
                os.write(content, stdin)
                try:
                    shim = subprocess.Popen(
                        [sys.executable, "-I", "-S", shim_main.__file__, str(_ROOT), str(memory), str(told)],
                        stdin=source,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        pass_fds=[memory, told],
                        env={},
                        cwd="/",
                        start_new_session=True,
                    )
                except OSError as error:
                    raise ProviderError(_FAILED, why=str(error)) from error
            try:
                return _answer(ready, deadline, progress)
            except BaseException:
                self._abort(ready, shim.pid)
                raise
            finally:
                shim.wait()  # it has forked at once

    def _abort(self, ready: int, group: int) -> None:
        """End a start that is given up; a command that is killed half-way would leave more than one that ends."""
        with contextlib.suppress(DeadlineExceeded):
            _answer(ready, Deadline(_ABORT), no_progress)
        if process := self.process:
            with contextlib.suppress(ProcessLookupError):
                if process.lives and os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)  # what it has forked (unshare --fork), too
            process.send(signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    @property
    def state(self) -> BackendState:
        """ABSENT without a record, STARTING during `start`, RUNNING while its first process lives, STOPPED."""
        known = self._read(_RECORD)
        if not known:
            return BackendState.ABSENT
        process = self.process
        if process is None and known["boot"] == boot_id() and Process(*known["starter"]).lives:
            return BackendState.STARTING
        return BackendState.RUNNING if process and process.lives else BackendState.STOPPED

    @property
    def record(self) -> dict[str, Any] | None:
        """What the provider recorded; None for an agent that does not exist."""
        return self._read(_RECORD).get("record")

    def note(self, **values: Any) -> None:
        """Add to the record.

        :raises ProviderError: it cannot be written.
        """
        if known := self._read(_RECORD):
            self._write({**known, "record": known["record"] | values})

    @property
    def process(self) -> Process | None:
        """The agent's first process, whether it lives or not; None if none was started since this boot."""
        known = self._read(_PROCESS)
        return Process(*known["processes"][0]) if known.get("boot") == boot_id() else None

    @property
    def exit_code(self) -> int | None:
        """The exit code of its first process (-N: killed by signal N); None while that lives, or if unknown."""
        code: int | None = self._read(_EXIT).get("code")
        return code

    def exit_reason(self, *, out_of_memory: bool = False) -> str:
        """Return why the agent ended, for `Observation.exit_reason`; "" while it lives.

        :param out_of_memory: the kernel has killed a process of the agent for memory.
        """
        known = self._read(_RECORD)
        if self.exit_code is None and known and known["boot"] != boot_id():
            return "the machine was restarted"
        process = self.process
        if process is None and self.exit_code is None:
            return "its start was interrupted"
        if process and process.lives:
            return ""
        self._wait_for_record()
        return exit_reason(self.exit_code, out_of_memory=out_of_memory)

    def remove(self) -> None:
        """Remove all that is recorded; absent is success.  The agent has ended."""
        self._wait_for_record()
        for name in (_RECORD, _PROCESS, _EXIT):
            (self.directory / name).unlink(missing_ok=True)

    def _wait_for_record(self) -> None:
        """Wait a moment until the shim has recorded the end of the first process."""
        known = self._read(_PROCESS)
        if known.get("boot") == boot_id():
            process, shim = (Process(*one) for one in known["processes"])
            end = time.monotonic() + _RECORDED
            while not process.lives and self.exit_code is None and shim.lives and time.monotonic() < end:
                time.sleep(0.005)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.directory / name).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"Cannot read {self.directory / name}",
                why=getattr(error, "strerror", None) or "it is damaged",
                fix="repair the state directory",
            ) from error
        return found

    def _write(self, content: Mapping[str, Any]) -> None:
        """Replace the record; a concurrent reader gets the complete old or new one."""
        new = self.directory / f"{_RECORD}.new"
        try:
            new.write_text(json.dumps(content), encoding="ascii")
            new.replace(self.directory / _RECORD)
        except OSError as error:
            raise ProviderError(
                f"Cannot write {self.directory / _RECORD}", why=error.strerror or "", fix="free some space"
            ) from error


def _answer(ready: int, deadline: Deadline, progress: Progress) -> str:
    """Return what a shim says; "" if it ended without a word.

    :raises DeadlineExceeded: it says nothing in time.
    """
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    while not poll.poll(min(_STEP, deadline.remaining()) * 1000):
        if deadline.expired:
            raise DeadlineExceeded("The agent was not started in time", fix="try again")
        progress("start", "starting its first process")
    return os.read(ready, 65536).decode("utf-8", "replace")
