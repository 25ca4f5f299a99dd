"""Memory and processor time of an agent: from its control group, else summed over its processes."""

from __future__ import annotations

import os

from dispatcher.plugin import Usage
from dispatcher_subprocess import processes, procfs
from dispatcher_subprocess.cgroups import Group
from dispatcher_subprocess.journal import Record


def usage(record: Record, group: Group | None) -> Usage:
    """Return what an agent uses."""
    counted = group.usage() if group else Usage()
    if counted.memory is not None and counted.cpu_seconds is not None:
        return counted
    found = processes.members(record, group)
    memory, seconds = counted.memory, counted.cpu_seconds
    if memory is None:
        memory = sum(_resident(process.pid) for process in found)
    if seconds is None:
        seconds = sum(process.cpu for process in found) / os.sysconf("SC_CLK_TCK")
    return Usage(memory=memory, cpu_seconds=seconds)


def _resident(pid: int) -> int:
    """Return a process's bytes of memory: its proportional share if that may be read, else its resident set."""
    for line in (procfs.read(f"/proc/{pid}/smaps_rollup") or b"").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    fields = (procfs.read(f"/proc/{pid}/statm") or b"0 0").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
