"""Suspending and resuming an agent in memory: by freezing its control group, else by SIGSTOP to every process."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded
from dispatcher_subprocess import processes, procfs
from dispatcher_subprocess.cgroups import Cgroups
from dispatcher_subprocess.errors import failed
from dispatcher_subprocess.journal import Journals, Process, Record

_ROUNDS = 64  # of SIGSTOP against forks; each finds what the last one missed


class Suspender:
    """Freezes and thaws agents.  The state is the kernel's, or a small file beside the journal."""

    def __init__(self, journals: Journals, cgroups: Cgroups) -> None:
        self._journals = journals
        self._cgroups = cgroups

    def is_suspended(self, record: Record) -> bool:
        """Whether an agent that runs is suspended."""
        group = self._cgroups.group(record.name)
        return (group is not None and group.frozen) or self._marked(record) is not None

    def suspend(self, record: Record, deadline: Deadline) -> None:
        """Suspend every process of an agent; suspended already is success.

        :raises DeadlineExceeded: that failed in time; the agent runs on.
        """
        if self.is_suspended(record):
            return
        if group := self._cgroups.group(record.name):
            if group.freeze(lambda: deadline.expired):
                return
            raise DeadlineExceeded(f"{record.agent} could not be suspended in time", fix="try again")
        self._mark(record, [])
        stopped = _stop_all(record, lambda: deadline.expired)
        if stopped is None:
            self._unmark(record)
            raise DeadlineExceeded(f"{record.agent} could not be suspended in time", fix="try again")
        self._mark(record, stopped)

    def resume(self, record: Record) -> None:
        """Let every process of an agent run on; running already is success."""
        if group := self._cgroups.group(record.name):
            group.thaw()
        stopped = self._marked(record)
        if stopped is not None:
            _continue_all(record, stopped)
            self._unmark(record)

    def _file(self, record: Record) -> Path:
        return self._journals.suspended_path(record.name)

    def _marked(self, record: Record) -> list[Process] | None:
        try:
            body = json.loads(self._file(record).read_bytes())
        except (OSError, ValueError):
            return None
        if body["token"] != record.token:
            return None  # of an earlier run
        return [Process(pid=pid, start=start) for pid, start in body["stopped"]]

    def _mark(self, record: Record, stopped: list[Process]) -> None:
        body = {"token": record.token, "stopped": [[process.pid, process.start] for process in stopped]}
        path = self._file(record)
        new = path.with_suffix(".suspended-new")
        try:
            new.write_text(json.dumps(body), encoding="ascii")
            new.rename(path)
        except OSError as error:
            raise failed(f"Cannot write {path}", error, fix="free some space") from error

    def _unmark(self, record: Record) -> None:
        self._file(record).unlink(missing_ok=True)


def _stop_all(record: Record, expired: Callable[[], bool]) -> list[Process] | None:
    """Stop every process by SIGSTOP, in rounds until no fork escapes any more.

    :return: those that were stopped already, which `resume` must not continue; None if it failed in time.
    """
    before: list[Process] = []
    seen: set[tuple[int, int]] = set()
    quiet = 0
    for number in range(_ROUNDS):
        new = [process for process in processes.members(record, None) if (process.pid, process.start) not in seen]
        for process in new:
            seen.add((process.pid, process.start))
            if process.state in "Tt":
                if number == 0:
                    before.append(Process(pid=process.pid, start=process.start))
            else:
                procfs.send(process.pid, process.start, signal.SIGSTOP)
        if number == 0:
            processes.signal_at_once(record, signal.SIGSTOP)  # if that works, the next rounds find none
        quiet = 0 if new else quiet + 1
        if quiet == 2:
            return before
        if expired():
            break
        time.sleep(0.005)
    _continue_all(record, before)
    return None


def _continue_all(record: Record, stopped: Iterable[Process]) -> None:
    """Let every process run again but those that were stopped before."""
    stay_stopped = {(process.pid, process.start) for process in stopped}
    for process in processes.members(record, None):
        if (process.pid, process.start) not in stay_stopped:
            procfs.send(process.pid, process.start, signal.SIGCONT)
