"""Ending agents: on demand, and tidying up after those that ended by themselves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError
from dispatcher_subprocess import launch, processes
from dispatcher_subprocess.attempt import clear_run_dir
from dispatcher_subprocess.cgroups import Cgroups, Group
from dispatcher_subprocess.procfs import boot_id
from dispatcher_subprocess.record import Journals, Record, told
from dispatcher_subprocess.secretfiles import SecretFiles

REBOOTED = "the machine was restarted"
INTERRUPTED = "its start was interrupted"
_TIDY = 10.0  # seconds to kill what an ended app left


def gone(record: Record) -> bool:
    """Whether an agent's app does not execute any more (or never did)."""
    return record.boot != boot_id() or record.ended is not None or not processes.main_lives(record)


class Ending:
    """Ends agents and settles what is known of ended ones."""

    def __init__(self, journals: Journals, cgroups: Cgroups, secret_files: SecretFiles) -> None:
        self._journals = journals
        self._secret_files = secret_files
        self._cgroups = cgroups

    def group(self, record: Record) -> Group | None:
        """Return an agent's control group, None where there are none."""
        return self._cgroups.group(record.name) if self._cgroups.usable else None

    def settle(self, record: Record) -> Record:
        """Tidy up after an agent that ended by itself: kill what it left, note why.  Others are left alone.

        The caller holds the agent's lock.
        """
        if record.ended is not None or not gone(record):
            return record
        if record.boot != boot_id():
            return self._note(record, "" if record.asked else REBOOTED)
        group = self.group(record)
        oom = group is not None and group.oom_kills() > 0
        limit = Deadline(_TIDY)
        processes.kill(record, group, lambda: limit.expired)
        code = self._reap(record)
        if record.main is None:
            return self._note(record, INTERRUPTED)
        if record.sandboxed:
            said = told(record).exit_code  # bubblewrap's own end says nothing when it was killed itself
            code = said if said is not None or code is None or code < 0 else code
        return self._note(record, "" if record.asked else exit_reason(code, out_of_memory=oom))

    def stop(self, record: Record, grace: float, deadline: Deadline, tick: Callable[[], None]) -> None:
        """End every process: TERM, then after `grace` seconds KILL.  The caller holds the lock.

        :raises DeadlineExceeded: something is still alive.
        """
        if self.settle(record).ended is not None:
            return
        self._journals.append(record.name, {"asked": True})
        group = self.group(record)
        processes.signal_all(record, group, signal.SIGTERM)
        self.thaw(record, group)
        processes.wait_end(record, group, min(grace, deadline.remaining()), tick)
        if not processes.kill(record, group, lambda: deadline.expired):
            raise DeadlineExceeded(
                f"{record.agent} does not end",
                why="a process cannot be killed now",
                fix="try again; see its state in ps",
            )
        self._reap(record)
        self._note(record, "")

    def thaw(self, record: Record, group: Group | None) -> None:
        """Let a sleeping agent handle its signals."""
        if group:
            group.thaw()
        processes.signal_all(record, group, signal.SIGCONT)

    def forget(self, name: str) -> None:
        """Remove all traces but the logs; the agent has ended."""
        if self._cgroups.usable:
            self._cgroups.group(name).remove()
        self._secret_files.remove(name)
        self._journals.remove(name)

    @staticmethod
    def _reap(record: Record) -> int | None:
        """Reap what were children of this process; return the exit code of the main one, None when it was none."""
        if record.helper:
            launch.reap(record.helper)
        return launch.reap(record.main) if record.main else None

    def _note(self, record: Record, reason: str) -> Record:
        self._journals.append(record.name, {"ended": reason})
        if self._cgroups.usable:
            self._cgroups.group(record.name).remove()
        self._secret_files.remove(record.name)
        self._journals.asleep_path(record.name).unlink(missing_ok=True)
        with contextlib.suppress(ProviderError):
            clear_run_dir(Path(record.run_dir))
        return replace(record, ended=reason)


def exit_reason(code: int | None, *, out_of_memory: bool) -> str:
    """Return in words why an app ended by itself.

    :param code: its exit code; -N, or 128 + N as bubblewrap tells it: killed by signal N; None: not known.
    """
    if code is None:
        return "ended, nobody saw how"
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL and out_of_memory:
        return "out of memory"
    try:
        return f"killed by signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"exit code {code}"
