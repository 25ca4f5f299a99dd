"""Memory and processor time of containers: from cgroup files on this host, else from the engine's statistics.

A cgroup's files take a tenth of a millisecond to read, the engine's statistics a second per container: those are
requested in parallel, and cached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from dispatcher.plugin import Deadline, DispatcherError, Usage, boottime
from dispatcher_docker.host import Engine

_PARALLEL = 16


class CgroupUsage:
    """Reads cgroup files, version 1 or 2, wherever the engine put the container."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        self._root, self._proc = root, proc
        self._known: dict[str, Mapping[str, Path]] = {}

    def knows(self, container: str) -> bool:
        """Whether a container's cgroup has been found already."""
        return container in self._known

    def guess(self, container: str) -> bool:
        """Look where engines put cgroups by default, which saves a request; return whether it is there."""
        for path in (f"docker/{container}", f"system.slice/docker-{container}.scope"):
            if (self._root / path / "memory.current").exists():
                self._known[container] = {"unified": self._root / path}
                return True
            found = {one: self._root / one / path for one in ("memory", "cpuacct")}
            if all(one.is_dir() for one in found.values()):
                self._known[container] = found
                return True
        return False

    def learn(self, container: str, pid: int) -> None:
        """Find the cgroups of a container by the id of its first process."""
        found: dict[str, Path] = {}
        try:
            text = (self._proc / str(pid) / "cgroup").read_text(encoding="ascii")
        except OSError:
            return
        for line in text.splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                candidate = self._root / path.lstrip("/")
                if (candidate / "memory.current").exists():
                    found["unified"] = candidate
            for controller in controllers.split(","):
                candidate = self._root / controller / path.lstrip("/")
                if controller in {"memory", "cpuacct"} and candidate.is_dir():
                    found[controller] = candidate
        if found:
            self._known[container] = found

    def forget(self, alive: Iterable[str]) -> None:
        """Drop all but the containers that run."""
        keep = set(alive)
        for container in [one for one in self._known if one not in keep]:
            self._known.pop(container, None)

    def read(self, container: str) -> Usage | None:
        """Return what a container uses; None if it is gone or its cgroup is not known."""
        groups = self._known.get(container, {})
        try:
            if unified := groups.get("unified"):
                memory = int((unified / "memory.current").read_text(encoding="ascii"))
                cache = _field(unified / "memory.stat", "inactive_file")
                return Usage(
                    memory=max(0, memory - cache), cpu_seconds=_field(unified / "cpu.stat", "usage_usec") / 1e6
                )
            if "memory" in groups and "cpuacct" in groups:
                memory = int((groups["memory"] / "memory.usage_in_bytes").read_text(encoding="ascii"))
                cache = _field(groups["memory"] / "memory.stat", "total_inactive_file")
                spent = int((groups["cpuacct"] / "cpuacct.usage").read_text(encoding="ascii"))
                return Usage(memory=max(0, memory - cache), cpu_seconds=spent / 1e9)
        except (OSError, ValueError):
            self._known.pop(container, None)
        return None


def _field(path: Path, name: str) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


class EngineUsage:
    """The engine's statistics, requested in parallel and cached.

    :param keep: seconds for which a cached answer is used.
    """

    def __init__(self, engine: Engine, keep: float) -> None:
        self._engine, self._keep = engine, keep
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Usage]] = {}

    def read(self, containers: Iterable[str], deadline: Deadline) -> dict[str, Usage]:
        """Return the usage of containers; cached answers that are too old are renewed before the deadline."""
        wanted = list(containers)
        now = boottime()
        with self._lock:
            self._known = {one: known for one, known in self._known.items() if one in set(wanted)}
            old = [one for one in wanted if one not in self._known or now - self._known[one][0] > self._keep]
        if old:
            pool = ThreadPoolExecutor(max_workers=min(_PARALLEL, len(old)), thread_name_prefix="docker-stats")
            wait([pool.submit(self._request, one, deadline) for one in old], timeout=deadline.remaining())
            pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            return {one: self._known[one][1] for one in wanted if one in self._known}

    def _request(self, container: str, deadline: Deadline) -> None:
        try:
            with self._engine.call("read the statistics", deadline) as client:
                found = client.stats(container, stream=False, one_shot=True)
        except DispatcherError:
            return  # removed meanwhile, or too late: the cached answer stays
        usage = from_statistics(found)
        if usage:
            with self._lock:
                self._known[container] = (boottime(), usage)


def from_statistics(found: Mapping[str, Any]) -> Usage | None:
    """Return the usage in the engine's statistics; None for a container that does not run."""
    memory = found.get("memory_stats") or {}
    if "usage" not in memory:
        return None
    stats = memory.get("stats") or {}
    cache = stats.get("inactive_file", stats.get("total_inactive_file", 0))
    spent = ((found.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage", 0)
    return Usage(memory=max(0, int(memory["usage"]) - int(cache)), cpu_seconds=spent / 1e9)
