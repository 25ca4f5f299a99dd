"""Control groups of agents: limits, usage, freezing, finding and killing.  Touches the cgroup file systems only.

Three worlds are met in the field and all are used as far as they go: version 2 with controllers, version 1, and
both at once (version 2 without controllers beside version 1).  Each agent has one group of its own name in
every hierarchy that is used, below one directory of the installation.  Nothing is remembered in memory: a
fresh instance finds an agent's groups by its name.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher.plugin import Limits, Usage
from dispatcher_subprocess import procfs

_WANTED = ("memory", "cpu", "pids")
_PERIOD = 100_000  # microseconds, the kernel's default
_ROUNDS = 64  # of killing against forks


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroups:
    """The installation's directories in the cgroup hierarchies of this host.

    :ivar unified: in version 2, None without it; :ivar controllers: those that version 2 limits by.
    :ivar legacy: version 1 controller -> directory.
    """

    unified: Path | None = None
    controllers: frozenset[str] = frozenset()
    legacy: dict[str, Path] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether agents get groups at all."""
        return self.unified is not None or bool(self.legacy)

    @property
    def can_freeze(self) -> bool:
        """Whether a group can be frozen."""
        return self.unified is not None or "freezer" in self.legacy

    def limits(self, controller: str) -> bool:
        """Whether memory, cpu or pids can be limited by a controller."""
        return controller in self.controllers or controller in self.legacy

    def tidy(self) -> None:
        """Remove the installation's directories when no agent is in them."""
        for path in dict.fromkeys([*([self.unified] if self.unified else []), *self.legacy.values()]):
            with contextlib.suppress(OSError):
                path.rmdir()

    def group(self, name: str) -> Group:
        """Return the group of an agent, whether it exists or not."""
        unified = self.unified / name if self.unified else None
        return Group(unified, self.controllers, {key: path / name for key, path in self.legacy.items()})


@dataclass(frozen=True, slots=True)
class Group:
    """One agent's groups."""

    unified: Path | None
    controllers: frozenset[str]
    legacy: dict[str, Path]

    @property
    def paths(self) -> list[Path]:
        """All directories of this group, each once."""
        return list(dict.fromkeys([*([self.unified] if self.unified else []), *self.legacy.values()]))

    def create(self, limits: Limits) -> list[Path]:
        """Make the group and set its limits; return the directories to `join`, in the order of their use.

        Only hierarchies that are needed are used: moving a process into one makes the kernel wait.

        :raises OSError: the kernel refuses.
        """
        needed = {"memory"}  # counted always
        if not self.unified:
            needed |= {"cpuacct", "freezer"}
        needed |= {name for name, limit in (("cpu", limits.cpus), ("pids", limits.pids)) if limit is not None}
        legacy = {name: path for name, path in self.legacy.items() if name in needed}
        paths = list(dict.fromkeys([*legacy.values(), *([self.unified] if self.unified else [])]))
        for path in paths:
            with contextlib.suppress(FileExistsError):
                try:
                    path.mkdir()
                except FileNotFoundError:  # another instance tidied up the installation's own directory
                    path.parent.mkdir(exist_ok=True)
                    if path == self.unified:
                        _enable(path.parent)
                    path.mkdir()
        if "memory" in legacy:
            self._legacy_memory(legacy["memory"], limits)
        if "cpu" in legacy:
            _write(legacy["cpu"] / "cpu.cfs_quota_us", _quota(limits) or -1)
        if "pids" in legacy:
            _write(legacy["pids"] / "pids.max", limits.pids or "max")
        if self.unified:
            self._limit_unified(self.unified, limits)
        return paths

    def _limit_unified(self, directory: Path, limits: Limits) -> None:
        if "memory" in self.controllers:
            _write(directory / "memory.max", limits.memory or "max")
            if limits.swap is not None:
                _try_write(directory / "memory.swap.max", limits.swap)
        if "cpu" in self.controllers:
            _write(directory / "cpu.max", f"{_quota(limits) or 'max'} {_PERIOD}")
        if "pids" in self.controllers:
            _write(directory / "pids.max", limits.pids or "max")

    @staticmethod
    def _legacy_memory(directory: Path, limits: Limits) -> None:
        # Memory alone may not exceed memory plus swap, so the order depends on what was set before: lift first.
        _try_write(directory / "memory.memsw.limit_in_bytes", -1)
        _write(directory / "memory.limit_in_bytes", limits.memory or -1)
        if limits.memory and limits.swap is not None:
            _try_write(directory / "memory.memsw.limit_in_bytes", limits.memory + limits.swap)

    def procs(self) -> set[int]:
        """Return the processes of the group, including those of groups that they made below it."""
        found: set[int] = set()
        for path in self._for_finding():
            for directory, _, _ in os.walk(path):
                text = procfs.read(os.path.join(directory, "cgroup.procs")) or b""
                found.update(int(word) for word in text.split())
        return found

    def _for_finding(self) -> Iterable[Path]:
        if self.unified:
            return [self.unified]
        return list(self.legacy.values())[:1]

    def kill(self) -> None:
        """Kill every process of the group."""
        if self.unified and _try_write(self.unified / "cgroup.kill", 1):
            return
        freezer = self.legacy.get("freezer")
        for _ in range(_ROUNDS):
            if freezer:  # so that none forks away; what is frozen in version 1 dies when it is thawed
                _try_write(freezer / "freezer.state", "FROZEN")
            alive = [found for pid in self.procs() if (found := procfs.stat(pid)) and not found.dead]
            for process in alive:
                procfs.send(process.pid, process.start, 9)
            self.thaw()
            if not alive:
                return
            time.sleep(0.002)

    def freeze(self, expired: Callable[[], bool]) -> bool:
        """Freeze the group; False when it did not freeze before `expired`, then it is thawed again."""
        if self.unified and _try_write(self.unified / "cgroup.freeze", 1):
            check: Callable[[], bool] = self._unified_frozen
        elif "freezer" in self.legacy and _try_write(self.legacy["freezer"] / "freezer.state", "FROZEN"):
            check = self._legacy_frozen
        else:
            return False
        pause = 0.0005
        while not check():
            if expired():
                self.thaw()
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
        return True

    def _unified_frozen(self) -> bool:
        return self.unified is not None and b"frozen 1" in (
            procfs.read(str(self.unified / "cgroup.events")) or b""
        )

    def _legacy_frozen(self) -> bool:
        return (procfs.read(str(self.legacy["freezer"] / "freezer.state")) or b"").strip() == b"FROZEN"

    def thaw(self) -> None:
        """Let the group run; running already is success."""
        if self.unified:
            _try_write(self.unified / "cgroup.freeze", 0)
        if "freezer" in self.legacy:
            _try_write(self.legacy["freezer"] / "freezer.state", "THAWED")

    @property
    def frozen(self) -> bool:
        """Whether the group is frozen or is just being frozen."""
        if self.unified and (procfs.read(str(self.unified / "cgroup.freeze")) or b"").strip() == b"1":
            return True
        if "freezer" not in self.legacy:
            return False
        return (procfs.read(str(self.legacy["freezer"] / "freezer.state")) or b"").strip() not in {b"", b"THAWED"}

    def usage(self) -> Usage:
        """Return what the group uses, None for what no controller counts.

        Memory is without the page cache that the kernel may drop at once, as everybody counts it.
        """
        return Usage(memory=self._memory(), cpu_seconds=self._cpu())

    def _memory(self) -> int | None:
        if "memory" in self.controllers and self.unified:
            used, cache = self.unified / "memory.current", b"inactive_file"
            stat = self.unified / "memory.stat"
        elif "memory" in self.legacy:
            used, cache = self.legacy["memory"] / "memory.usage_in_bytes", b"total_inactive_file"
            stat = self.legacy["memory"] / "memory.stat"
        else:
            return None
        text = procfs.read(str(used))
        if not text:
            return None
        return max(0, int(text) - _value(procfs.read(str(stat)), cache, 0))

    def _cpu(self) -> float | None:
        if self.unified:
            microseconds = _value(procfs.read(str(self.unified / "cpu.stat")), b"usage_usec", -1)
            if microseconds >= 0:
                return microseconds / 1e6
        if "cpuacct" in self.legacy:
            text = procfs.read(str(self.legacy["cpuacct"] / "cpuacct.usage"))
            return int(text) / 1e9 if text else None
        return None

    def oom_kills(self) -> int:
        """Return how many processes of the group were killed because its memory was used up."""
        if "memory" in self.controllers and self.unified:
            return _value(procfs.read(str(self.unified / "memory.events")), b"oom_kill", 0)
        if "memory" in self.legacy:
            return _value(procfs.read(str(self.legacy["memory"] / "memory.oom_control")), b"oom_kill", 0)
        return 0

    def remove(self) -> bool:
        """Remove the group; False while a process is in it.  Absent is success."""
        done = True
        for path in self.paths:
            for directory, _, _ in os.walk(path, topdown=False):
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    pass
                except OSError:
                    done = False
        return done


def join(paths: Iterable[Path], pid: int) -> None:
    """Move a process into groups, and what it forks from now on.

    :raises OSError: the kernel refuses, or the process is gone.
    """
    for path in paths:
        _write(path / "cgroup.procs", pid)


def discover(base: str, mountinfo: str, own: str) -> Cgroups:
    """Make the directory `base` in every hierarchy where that is possible, and say what can be done there.

    As root that is at the top of each hierarchy; an ordinary user gets the highest group that was delegated.

    :param base: name of the installation's directory; :param mountinfo, own: content of
        ``/proc/self/mountinfo`` and ``/proc/self/cgroup``.
    """
    unified: Path | None = None
    controllers: frozenset[str] = frozenset()
    legacy: dict[str, Path] = {}
    membership = _membership(own)
    mounts = list(_mounts(mountinfo))
    for mount, kind, _ in mounts:
        directory = _claim(mount, membership.get("", "/"), base) if kind == "cgroup2" else None
        if directory:
            unified, controllers = directory, _enable(directory)
    # What version 2 does already: it always freezes and counts processor time.
    wanted = {"memory", "cpu", "pids"} - controllers | (set() if unified else {"cpuacct", "freezer"})
    for mount, _, names in mounts:
        for name in names & wanted:
            directory = _claim(mount, membership.get(name, "/"), base)
            if directory:
                legacy[name] = directory
    return Cgroups(unified=unified, controllers=controllers, legacy=legacy)


def _membership(own: str) -> dict[str, str]:
    found = {}
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            found[name] = path
    return found


def _mounts(mountinfo: str) -> Iterable[tuple[Path, str, set[str]]]:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind in {"cgroup", "cgroup2"}:
            names = set(options.split(" ")[-1].split(",")) if kind == "cgroup" else set()
            yield Path(before.split(" ")[4].encode().decode("unicode_escape")), kind, names


def _claim(mount: Path, own: str, base: str) -> Path | None:
    """Make `base` below the highest group on the way to our own that we may write to and move processes from."""
    candidates = [mount]
    for part in Path(own).parts[1:]:
        candidates.append(candidates[-1] / part)
    for candidate in candidates:
        if os.access(candidate, os.W_OK) and os.access(candidate / "cgroup.procs", os.W_OK):
            directory = candidate / base
            try:
                directory.mkdir(exist_ok=True)
                probe = directory / "probe"
                probe.mkdir(exist_ok=True)
                probe.rmdir()
            except OSError:
                continue
            return directory
    return None


def _enable(directory: Path) -> frozenset[str]:
    """Turn on what version 2 offers for groups below `directory`; return what is on then."""
    for parent in (directory.parent, directory):
        for name in _WANTED:
            _try_write(parent / "cgroup.subtree_control", f"+{name}")
    on = (procfs.read(str(directory / "cgroup.subtree_control")) or b"").decode().split()
    return frozenset(on) & frozenset(_WANTED)


def _value(text: bytes | None, key: bytes, default: int) -> int:
    for line in (text or b"").splitlines():
        name, _, value = line.partition(b" ")
        if name == key:
            return int(value)
    return default


def _quota(limits: Limits) -> int | None:
    return int(limits.cpus * _PERIOD) if limits.cpus else None


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
