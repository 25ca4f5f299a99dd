"""Memory and processor time of containers: from cgroup files on this host, else from the engine's statistics.

A cgroup's files take a tenth of a millisecond to read, the engine's statistics a second per container: those are
requested in parallel, and cached.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from dispatcher.plugin import Deadline, DispatcherError, Usage, boottime
from dispatcher_docker.engine import Engine

_PARALLEL = 16
_ROOT = Path("/sys/fs/cgroup")


def _groups(container: str, root: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Yield where its cgroups may be: that of version 2, and of version 1 those of memory and cpuacct."""
    for path in (
        f"docker/{container}",
        f"system.slice/docker-{container}.scope",
        f"libpod_parent/libpod-{container}",  # Podman's
        f"machine.slice/libpod-{container}.scope",
    ):
        yield root / path, root / "memory" / path, root / "cpuacct" / path


def oom_kills(container: str, root: Path = _ROOT) -> int:
    """Return how many processes of a container of this host the kernel has killed for memory; 0 if not known."""
    for group, memory, _ in _groups(container, root):
        for path in (group / "memory.events", memory / "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                return _field(path, "oom_kill")
    return 0


def from_cgroup(container: str, root: Path = _ROOT) -> Usage | None:
    """Return what a container of this host uses, from cgroup files of version 1 or 2.

    None if it is gone, or its cgroup is not where engines put it by default.
    """
    for group, memory, cpu in _groups(container, root):
        with contextlib.suppress(OSError, ValueError):
            used = _number(group / "memory.current") - _field(group / "memory.stat", "inactive_file")
            return Usage(memory=max(0, used), cpu_seconds=_field(group / "cpu.stat", "usage_usec") / 1e6)
        with contextlib.suppress(OSError, ValueError):
            used = _number(memory / "memory.usage_in_bytes") - _field(
                memory / "memory.stat", "total_inactive_file"
            )
            return Usage(memory=max(0, used), cpu_seconds=_number(cpu / "cpuacct.usage") / 1e9)
    return None


def counts_socket_buffers_apart(root: Path = _ROOT) -> bool:
    """Whether this host counts the buffers of sockets apart from other memory: control groups of version 1."""
    return (root / "memory/memory.kmem.tcp.limit_in_bytes").exists()


def limit_socket_buffers(container: str, limit: int, root: Path = _ROOT) -> None:
    """Limit the buffers of the sockets that a container of this host opens from now on.

    With control groups of version 2 they count as memory; of version 1 runc does not set this limit.
    """
    for _, memory, _ in _groups(container, root):
        if (path := memory / "memory.kmem.tcp.limit_in_bytes").exists():
            with contextlib.suppress(OSError):
                path.write_text(str(limit), encoding="ascii")


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _field(path: Path, name: str) -> int:
    fields = dict(line.split(" ", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(fields.get(name, 0))


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
