"""Suspending and resuming an agent in memory: its control group is frozen, or else every process gets SIGSTOP."""

from __future__ import annotations

import json
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError
from dispatcher_subprocess import processes
from dispatcher_subprocess.cgroups import Cgroups, Group
from dispatcher_subprocess.record import Journals, Process, Record


class Sleeping:
    """Freezes and thaws agents.  The state is in the kernel, or in a small file beside the journal."""

    def __init__(self, journals: Journals, cgroups: Cgroups) -> None:
        self._journals = journals
        self._cgroups = cgroups

    def asleep(self, record: Record) -> bool:
        """Whether an agent that lives is frozen."""
        group = self._group(record)
        return (group is not None and group.frozen) or self._marked(record) is not None

    def suspend(self, record: Record, deadline: Deadline) -> None:
        """Freeze every process of an agent; asleep already is success.

        :raises DeadlineExceeded: it did not come to rest in time; it runs on.
        """
        if self.asleep(record):
            return
        group = self._group(record)
        if group:
            if group.freeze(lambda: deadline.expired):
                return
            raise DeadlineExceeded(f"{record.agent} does not come to rest", fix="try again")
        self._mark(record, [])
        members = self._cgroups.group(record.name) if self._cgroups.usable else None
        resting = processes.stop_rounds(record, members, lambda: deadline.expired)
        if resting is None:
            self._unmark(record)
            raise DeadlineExceeded(f"{record.agent} does not come to rest", fix="try again")
        self._mark(record, resting)

    def resume(self, record: Record) -> None:
        """Let every process of an agent run on; running already is success."""
        group = self._group(record)
        if group:
            group.thaw()
        resting = self._marked(record)
        if resting is not None:
            members = self._cgroups.group(record.name) if self._cgroups.usable else None
            processes.continue_all(record, members, resting)
            self._unmark(record)

    def _group(self, record: Record) -> Group | None:
        """Return the agent's group where it can be frozen and the agent cannot leave it."""
        return self._cgroups.group(record.name) if self._cgroups.can_freeze else None

    def _file(self, record: Record) -> Path:
        return self._journals.asleep_path(record.name)

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
        fresh = path.with_suffix(".asleep-new")
        try:
            fresh.write_text(json.dumps(body), encoding="ascii")
            fresh.rename(path)
        except OSError as error:
            raise ProviderError(
                f"Cannot write {path}", why=error.strerror or str(error), fix="make room"
            ) from error

    def _unmark(self, record: Record) -> None:
        self._file(record).unlink(missing_ok=True)
