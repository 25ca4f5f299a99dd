"""Resource usage of running machines, in one call for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import libvirt

from dispatcher.plugin import Deadline, Usage
from dispatcher_libvirt.connection import Backend

_KINDS = libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_BLOCK
# NOWAIT leaves out a domain that is busy (being saved, for example).
_FLAGS = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT


def usage(backend: Backend, names: Iterable[str], deadline: Deadline) -> Mapping[str, Usage]:
    """Return the usage of running domains by name."""
    wanted = set(names)

    def query(connection: libvirt.virConnect) -> dict[str, Usage]:
        stats = ((domain.name(), values) for domain, values in connection.getAllDomainStats(_KINDS, _FLAGS))
        return {name: _usage(values) for name, values in stats if name in wanted}

    return backend.call(query, what="reading machines' usage", deadline=deadline) if wanted else {}


def _usage(stats: Mapping[str, Any]) -> Usage:
    memory = stats.get("balloon.rss") or stats.get("balloon.current")
    disks = range(int(stats.get("block.count", 0)))
    cpu = stats.get("cpu.time")
    return Usage(
        memory=None if memory is None else int(memory) * 1024,
        cpu_seconds=None if cpu is None else int(cpu) / 1e9,
        disk=sum(int(stats.get(f"block.{index}.allocation", 0)) for index in disks),
    )
