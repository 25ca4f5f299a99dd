"""Stopping and suspending agents, and cleaning up after those that ended by themselves.

An agent is suspended in memory: by freezing its control group, else by SIGSTOP to every process.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatcher.plugin import Deadline, DeadlineExceeded, Process, ProviderError, SecretFiles, exit_reason
from dispatcher_subprocess.errors import failed
from dispatcher_subprocess.processes import procfs
from dispatcher_subprocess.processes.cgroups import Cgroups
from dispatcher_subprocess.processes.run import Run, reap
from dispatcher_subprocess.processes.run_record import Journals, Record
from dispatcher_subprocess.start import clear_run_dir

REBOOTED = "the machine was restarted"
INTERRUPTED = "its start was interrupted"
_CLEAN_UP = 10.0  # seconds to kill the rest of an ended app
_ROUNDS = 64  # of SIGSTOP against forks; each finds what the last one missed


class Stopper:
    """Stops, suspends and resumes agents, and records why others ended.

    What suspends an agent is the kernel's state, or a small file beside the journal.
    """

    def __init__(self, journals: Journals, cgroups: Cgroups, secret_files: SecretFiles) -> None:
        self._journals = journals
        self._secret_files = secret_files
        self._cgroups = cgroups

    def run(self, record: Record) -> Run:
        """Return the processes of an agent."""
        return Run(record, self._cgroups.group(record.name))

    def clean_up(self, record: Record) -> Record:
        """If an agent ended by itself, kill the rest of it and record why; otherwise do nothing.

        The caller holds the agent's lock.
        """
        run = self.run(record)
        if record.ended is not None or not run.gone:
            return record
        if record.boot != procfs.boot_id():
            return self._record_end(record, "" if record.stop_requested else REBOOTED)
        oom = run.group is not None and run.group.oom_kills() > 0
        run.kill(Deadline(_CLEAN_UP))
        code = _reap(record)
        if record.main is None:
            return self._record_end(record, INTERRUPTED)
        if record.sandboxed:
            known = record.sandbox_status().get("exit-code")  # the app's, also if bubblewrap itself was killed
            code = known if known is not None or code is None or code < 0 else code
        reason = "" if record.stop_requested else exit_reason(code, out_of_memory=oom)
        if record.unseen and code:
            reason += f"; its command names {record.unseen}, which the sandbox does not show: add it to read_only"
        return self._record_end(record, reason)

    def stop(self, record: Record, grace: float, deadline: Deadline, on_wait: Callable[[], None]) -> None:
        """End every process: TERM, then after `grace` seconds KILL.  The caller holds the lock.

        :raises DeadlineExceeded: a process is still alive.
        """
        if self.clean_up(record).ended is not None:
            return
        self._note(record, {"stop_requested": True})
        run = self.run(record)
        run.signal(signal.SIGTERM)
        if run.group:  # it handles its signals only if it runs
            run.group.thaw()
        run.signal(signal.SIGCONT)
        run.wait_end(min(grace, deadline.remaining()), on_wait)
        if not run.kill(deadline):
            raise DeadlineExceeded(
                f"{record.agent} did not end in time",
                why="a process cannot be killed now",
                fix="try again; check its state with ps",
            )
        _reap(record)
        self._record_end(record, "")

    def forget(self, name: str) -> None:
        """Remove everything but the logs; the agent has ended."""
        if group := self._cgroups.group(name):
            group.remove()
        self._secret_files.remove(name)
        self._journals.remove(name)

    def _record_end(self, record: Record, reason: str) -> Record:
        self._note(record, {"ended": reason})
        if group := self._cgroups.group(record.name):
            group.remove()
        self._secret_files.remove(record.name)
        self._journals.suspended_path(record.name).unlink(missing_ok=True)
        with contextlib.suppress(ProviderError):
            clear_run_dir(Path(record.run_dir))
        return replace(record, ended=reason)

    def _note(self, record: Record, document: dict[str, Any]) -> None:
        """Add to the journal; a full disk costs the reason of the end, but must not prevent it."""
        with contextlib.suppress(ProviderError):
            self._journals.append(record.name, document)

    def is_suspended(self, record: Record) -> bool:
        """Whether an agent that runs is suspended."""
        group = self._cgroups.group(record.name)
        return (group is not None and group.frozen) or self._journals.suspended_path(record.name).exists()

    def suspend(self, record: Record, deadline: Deadline) -> None:
        """Suspend every process of an agent; suspended already is success.

        :raises DeadlineExceeded: that failed in time; the agent runs on.
        """
        run = self.run(record)
        if self.is_suspended(record):
            return
        if run.group:
            done = run.group.freeze(deadline)
        else:
            self._mark(record, [])
            stopped = _stop_all(run, deadline)
            done = stopped is not None
            if stopped is None:
                self._journals.suspended_path(record.name).unlink(missing_ok=True)
            else:
                self._mark(record, stopped)
        if not done:
            raise DeadlineExceeded(f"{record.agent} could not be suspended in time", fix="try again")

    def resume(self, record: Record) -> None:
        """Let every process of an agent run on; running already is success."""
        run, path = self.run(record), self._journals.suspended_path(record.name)
        if run.group:
            run.group.thaw()
        with contextlib.suppress(FileNotFoundError):
            try:
                stopped = [Process(pid, start) for pid, start in json.loads(path.read_bytes())]
            except ValueError:  # its writer was killed
                stopped = []
            _continue_all(run, stopped)
            path.unlink()

    def _mark(self, record: Record, stopped: list[Process]) -> None:
        """Record that an agent is suspended, and which of its processes were stopped before."""
        path = self._journals.suspended_path(record.name)
        try:
            path.write_text(json.dumps([[process.pid, process.start] for process in stopped]), encoding="ascii")
        except OSError as error:
            raise failed(f"Cannot write {path}", error, fix="repair the state directory") from error


def _reap(record: Record) -> int | None:
    """Reap the agent's processes that are children of this one; return the main one's exit code, if it is."""
    if record.helper:
        reap(record.helper)
    return reap(record.main) if record.main else None


def _stop_all(run: Run, deadline: Deadline) -> list[Process] | None:
    """Stop every process by SIGSTOP, in rounds until no fork escapes any more.

    :return: those that were stopped already, which `resume` must not continue; None if it failed in time.
    """
    before: list[Process] = []
    seen: set[Process] = set()
    quiet = 0
    for number in range(_ROUNDS):
        new = [found for found in run.members() if found.process not in seen]
        for found in new:
            seen.add(found.process)
            if found.state not in "Tt":
                found.send(signal.SIGSTOP)
            elif number == 0:
                before.append(found.process)
        if number == 0:
            run.signal_at_once(signal.SIGSTOP)  # if that works, the next rounds find none
        quiet = 0 if new else quiet + 1
        if quiet == 2:
            return before
        if deadline.expired:
            break
        time.sleep(0.005)
    _continue_all(run, before)
    return None


def _continue_all(run: Run, stopped: Collection[Process]) -> None:
    """Let every process run again but those that were stopped before."""
    for found in run.members():
        if found.process not in stopped:
            found.send(signal.SIGCONT)
