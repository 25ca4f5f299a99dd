"""Control groups of agents: limits, usage, freezing, finding and killing.

Each agent has one group of its own name in the version 2 hierarchy, below one directory of the installation.
That is in the group of systemd's unit UNIT, which is delegated to us, if the manager runs beside it.
Where the host's memory, cpu or pids controller belongs to version 1, as it may beside version 2, the agent has a
group of the same name there too, for that limit alone.  Without a version 2 hierarchy no control groups are used.
Nothing is kept in this process: another instance finds an agent's groups by its name.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher.plugin import Deadline, Limits, Usage, process_stat
from dispatcher_subprocess.processes import procfs

_ROOT = Path("/sys/fs/cgroup")
_WANTED = ("memory", "cpu", "pids")
_PERIOD = 100_000  # microseconds, the kernel's default
_ROUNDS = 64  # of killing against forks
UNIT = "dispatcher-agents.service"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroups:
    """The installation's directories in the cgroup hierarchies of this host.

    :ivar directory: in version 2, None if control groups cannot be used; :ivar controllers: of version 2.
    :ivar legacy: version 1 controller -> directory.
    :ivar helpers: group of the processes that outlive the manager but are of no agent; None: they stay in its own.
    """

    directory: Path | None = None
    controllers: frozenset[str] = frozenset()
    legacy: dict[str, Path] = field(default_factory=dict)
    helpers: Path | None = None

    def limits(self, controller: str) -> bool:
        """Whether memory, cpu or pids can be limited by a controller."""
        return controller in self.controllers or controller in self.legacy

    def adopt(self, pid: int) -> None:
        """Move a helper out of the manager's group, as systemd warns of what is left there."""
        if self.helpers:
            with contextlib.suppress(OSError):
                self.helpers.mkdir(exist_ok=True)
                join([self.helpers], pid)

    def tidy(self) -> None:
        """Remove the installation's directories when no agent is in them."""
        for path in filter(None, {self.directory, *self.legacy.values()}):
            with contextlib.suppress(OSError):
                path.rmdir()

    def group(self, name: str) -> Group | None:
        """Return the group of an agent, whether it exists or not; None without control groups."""
        if self.directory is None:
            return None
        return Group(
            self.directory / name, self.controllers, {key: path / name for key, path in self.legacy.items()}
        )


@dataclass(frozen=True, slots=True)
class Group:
    """One agent's group, and its groups for version 1 controllers."""

    directory: Path
    controllers: frozenset[str]
    legacy: dict[str, Path]

    def create(self, limits: Limits) -> list[Path]:
        """Make the group and set its limits; return the directories to `join`, in the order of their use.

        A version 1 controller that is not needed is not used: moving a process into a group makes the kernel wait.

        :raises OSError: the kernel refuses.
        """
        unlimited = {name for name, limit in (("cpu", limits.cpus), ("pids", limits.pids)) if limit is None}
        legacy = {name: path for name, path in self.legacy.items() if name not in unlimited}
        paths = [*dict.fromkeys(legacy.values()), self.directory]
        for path in paths:
            with contextlib.suppress(FileExistsError):
                try:
                    path.mkdir()
                except FileNotFoundError:  # another instance removed the installation's own directory
                    path.parent.mkdir(exist_ok=True)
                    if path == self.directory:
                        _enable(path.parent)
                    path.mkdir()
        for name, value in self._settings(limits, legacy):
            _write(name, value)
        return paths

    def _settings(self, limits: Limits, legacy: dict[str, Path]) -> Iterator[tuple[Path, object]]:
        """Yield files and what to write there; those that count swap exist where the kernel is built for it."""
        quota = int(limits.cpus * _PERIOD) if limits.cpus else None
        if "memory" in self.controllers:
            yield self.directory / "memory.max", limits.memory or "max"
            if limits.swap is not None and (swap := self.directory / "memory.swap.max").exists():
                yield swap, limits.swap
        if "cpu" in self.controllers:
            yield self.directory / "cpu.max", f"{quota or 'max'} {_PERIOD}"
        if "pids" in self.controllers:
            yield self.directory / "pids.max", limits.pids or "max"
        if memory := legacy.get("memory"):
            both = memory / "memory.memsw.limit_in_bytes"
            if both.exists():  # never below the limit of memory, so an old limit is removed first
                yield both, -1
            yield memory / "memory.limit_in_bytes", limits.memory or -1
            if limits.memory and limits.swap is not None and both.exists():
                yield both, limits.memory + limits.swap
            if (tcp := memory / "memory.kmem.tcp.limit_in_bytes").exists():  # version 2 counts buffers as memory
                yield tcp, limits.memory or -1
        if "cpu" in legacy:
            yield legacy["cpu"] / "cpu.cfs_quota_us", quota or -1
        if "pids" in legacy:
            yield legacy["pids"] / "pids.max", limits.pids or "max"

    def procs(self) -> set[int]:
        """Return the processes of the group, including those of groups that they made below it."""
        found: set[int] = set()
        for directory, _, _ in os.walk(self.directory):
            found.update(int(word) for word in procfs.read(f"{directory}/cgroup.procs").split())
        return found

    def kill(self) -> None:
        """Kill every process of the group."""
        if _try_write(self.directory / "cgroup.kill", 1):
            return
        for _ in range(_ROUNDS):  # before Linux 5.14
            alive = [found for pid in self.procs() if (found := process_stat(pid)) and not found.dead]
            for process in alive:
                process.send(9)
            self.thaw()
            if not alive:
                return
            time.sleep(0.002)

    def freeze(self, deadline: Deadline) -> bool:
        """Freeze the group; False if it is not frozen before the deadline, then it is thawed again."""
        if not _try_write(self.directory / "cgroup.freeze", 1):
            return False
        pause = 0.0005
        while b"frozen 1" not in self._read("cgroup.events"):
            if deadline.expired:
                self.thaw()
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
        return True

    def thaw(self) -> None:
        """Thaw the group; running already is success."""
        _try_write(self.directory / "cgroup.freeze", 0)

    @property
    def frozen(self) -> bool:
        """Whether the group is frozen or is just being frozen."""
        return self._read("cgroup.freeze").strip() == b"1"

    def usage(self) -> Usage:
        """Return what the group uses, None for what no controller counts.

        Memory does not include the page cache that the kernel can drop at once.
        """
        microseconds = _value(self._read("cpu.stat"), b"usage_usec", -1)
        if "memory" in self.controllers:
            used, cache = self._read("memory.current"), _value(self._read("memory.stat"), b"inactive_file", 0)
        else:
            used = self._read_legacy("memory.usage_in_bytes")
            cache = _value(self._read_legacy("memory.stat"), b"total_inactive_file", 0)
        return Usage(
            memory=max(0, int(used) - cache) if used else None,
            cpu_seconds=microseconds / 1e6 if microseconds >= 0 else None,
        )

    def oom_kills(self) -> int:
        """Return how many processes of the group were killed because its memory was used up."""
        counted = self._read("memory.events") or self._read_legacy("memory.oom_control")
        return _value(counted, b"oom_kill", 0)

    def remove(self) -> None:
        """Remove the group, unless a process is in it.  Absent is success."""
        for path in {self.directory, *self.legacy.values()}:
            for directory, _, _ in os.walk(path, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)

    def _read(self, name: str) -> bytes:
        return procfs.read(f"{self.directory}/{name}")

    def _read_legacy(self, name: str) -> bytes:
        """Read a file of version 1's memory controller; b"" where that is not used."""
        return procfs.read(f"{self.legacy['memory']}/{name}") if "memory" in self.legacy else b""


def join(paths: Iterable[Path], pid: int) -> None:
    """Move a process into groups, and its later children with it.

    :raises OSError: the kernel refuses, or the process is gone.
    """
    for path in paths:
        _write(path / "cgroup.procs", pid)


def discover(base: str, own: str, root: Path = _ROOT) -> Cgroups:
    """Make the directory `base` in every hierarchy that is used, and say what can be done there.

    It is in the group of UNIT if there is one.  Otherwise, as root, it is at the top of each hierarchy; an
    ordinary user gets the highest group that was delegated.

    :param base: name of the installation's directory; :param own: content of ``/proc/self/cgroup``.
    """
    membership = {
        name: path
        for _, names, path in (line.split(":", 2) for line in own.splitlines())
        for name in names.split(",")
    }
    mount = next((path for path in (root, root / "unified") if (path / "cgroup.controllers").exists()), None)
    group = membership.get("", "/")
    unit = (mount / group.strip("/")).parent / UNIT if mount else None
    if unit and unit.exists() and (directory := _make(unit / base)):
        return Cgroups(directory=directory, controllers=_enable(directory), helpers=directory.parent / "helpers")
    directory = _claim(mount, group, base) if mount else None
    if directory is None:
        return Cgroups()
    controllers = _enable(directory)
    claims = {
        name: _claim(root / name, membership.get(name, "/"), base) for name in _WANTED if name not in controllers
    }
    legacy = {name: path for name, path in claims.items() if path}
    return Cgroups(directory=directory, controllers=controllers, legacy=legacy)


def _claim(mount: Path, own: str, base: str) -> Path | None:
    """Make `base` below the highest group on the way to our own that we may write to and move processes from."""
    group = mount
    for part in Path(own).parts:  # the first one is "/"
        group = group / part if part != "/" else mount
        writable = os.access(group, os.W_OK) and os.access(group / "cgroup.procs", os.W_OK)
        if writable and (directory := _make(group / base)):
            return directory
    return None


def _make(directory: Path) -> Path | None:
    """Make a group that others can be made in; None if the kernel refuses."""
    with contextlib.suppress(OSError):
        directory.mkdir(exist_ok=True)
        probe = directory / "probe"
        probe.mkdir(exist_ok=True)
        probe.rmdir()
        return directory
    return None


def _enable(directory: Path) -> frozenset[str]:
    """Turn on what version 2 offers for groups below `directory`; return what is on then."""
    for parent in (directory.parent, directory):
        for name in _WANTED:
            _try_write(parent / "cgroup.subtree_control", f"+{name}")
    on = procfs.read(f"{directory}/cgroup.subtree_control").decode().split()
    return frozenset(on).intersection(_WANTED)


def _value(text: bytes, key: bytes, default: int) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if name == key:
            return int(value)
    return default


def _write(path: Path, value: object) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _try_write(path: Path, value: object) -> bool:
    try:
        _write(path, value)
    except OSError:
        return False
    return True
