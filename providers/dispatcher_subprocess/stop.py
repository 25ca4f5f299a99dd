"""Stopping agents, and cleaning up after those that ended by themselves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError, SecretFiles
from dispatcher_subprocess import processes
from dispatcher_subprocess.cgroups import Cgroups, Group
from dispatcher_subprocess.journal import Journals, Record, sandbox_status
from dispatcher_subprocess.procfs import boot_id
from dispatcher_subprocess.start import clear_run_dir

REBOOTED = "the machine was restarted"
INTERRUPTED = "its start was interrupted"
_CLEAN_UP = 10.0  # seconds to kill the rest of an ended app


def gone(record: Record) -> bool:
    """Whether an agent's app does not run (or never did)."""
    return record.boot != boot_id() or record.ended is not None or not processes.main_lives(record)


class Stopper:
    """Stops agents, and records why others ended."""

    def __init__(self, journals: Journals, cgroups: Cgroups, secret_files: SecretFiles) -> None:
        self._journals = journals
        self._secret_files = secret_files
        self._cgroups = cgroups

    def group(self, record: Record) -> Group | None:
        """Return an agent's control group, None without control groups."""
        return self._cgroups.group(record.name)

    def clean_up(self, record: Record) -> Record:
        """If an agent ended by itself, kill the rest of it and record why; otherwise do nothing.

        The caller holds the agent's lock.
        """
        if record.ended is not None or not gone(record):
            return record
        if record.boot != boot_id():
            return self._record_end(record, "" if record.stop_requested else REBOOTED)
        group = self.group(record)
        oom = group is not None and group.oom_kills() > 0
        limit = Deadline(_CLEAN_UP)
        processes.kill(record, group, lambda: limit.expired)
        code = self._reap(record)
        if record.main is None:
            return self._record_end(record, INTERRUPTED)
        if record.sandboxed:
            known = sandbox_status(record).exit_code  # that of the app, also if bubblewrap itself was killed
            code = known if known is not None or code is None or code < 0 else code
        return self._record_end(record, "" if record.stop_requested else exit_reason(code, out_of_memory=oom))

    def stop(self, record: Record, grace: float, deadline: Deadline, on_wait: Callable[[], None]) -> None:
        """End every process: TERM, then after `grace` seconds KILL.  The caller holds the lock.

        :raises DeadlineExceeded: a process is still alive.
        """
        if self.clean_up(record).ended is not None:
            return
        self._journals.append(record.name, {"stop_requested": True})
        group = self.group(record)
        processes.signal_all(record, group, signal.SIGTERM)
        self._resume(record, group)
        processes.wait_end(record, group, min(grace, deadline.remaining()), on_wait)
        if not processes.kill(record, group, lambda: deadline.expired):
            raise DeadlineExceeded(
                f"{record.agent} did not end in time",
                why="a process cannot be killed now",
                fix="try again; check its state with ps",
            )
        self._reap(record)
        self._record_end(record, "")

    def _resume(self, record: Record, group: Group | None) -> None:
        """Resume a suspended agent, so that it handles its signals."""
        if group:
            group.thaw()
        processes.signal_all(record, group, signal.SIGCONT)

    def forget(self, name: str) -> None:
        """Remove everything but the logs; the agent has ended."""
        if group := self._cgroups.group(name):
            group.remove()
        self._secret_files.remove(name)
        self._journals.remove(name)

    @staticmethod
    def _reap(record: Record) -> int | None:
        """Reap the agent's processes that are children of this one; return the main one's exit code, if it is."""
        if record.helper:
            processes.reap(record.helper)
        return processes.reap(record.main) if record.main else None

    def _record_end(self, record: Record, reason: str) -> Record:
        self._journals.append(record.name, {"ended": reason})
        if group := self.group(record):
            group.remove()
        self._secret_files.remove(record.name)
        self._journals.suspended_path(record.name).unlink(missing_ok=True)
        with contextlib.suppress(ProviderError):
            clear_run_dir(Path(record.run_dir))
        return replace(record, ended=reason)


def exit_reason(code: int | None, *, out_of_memory: bool) -> str:
    """Describe why an app ended by itself.

    :param code: its exit code; -N, or 128 + N from bubblewrap: killed by signal N; None: unknown.
    """
    if code is None:
        return "ended, reason unknown"
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL and out_of_memory:
        return "out of memory"
    try:
        return f"killed by signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"exit code {code}"
