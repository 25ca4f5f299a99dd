"""Observations of machines from their domains and consoles, their usage in one call for all, and their changes."""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import libvirt

from dispatcher.plugin import BackendState, Deadline, DispatcherError, Endpoint, Observation, Usage
from dispatcher_libvirt import domain_xml, logs
from dispatcher_libvirt.connection import Backend, Lane, Slot
from dispatcher_libvirt.domains import DomainInfo

BOOTING = 120.0  # seconds after a start for which the console's last line is the detail
# QEMU accepts a connection before the guest has a network, and retries it only after 3, 9 and 21 s.  So there is
# no endpoint until the guest announces its network, or this many seconds after the start.
ANNOUNCED = 30.0

_RETRY = 1.0  # seconds between two attempts to connect for events
_CONNECT = 10.0
_CHECK = 5.0  # seconds between two checks of the connection, in addition to its close callback

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")

_RUNNING = {libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED, libvirt.VIR_DOMAIN_SHUTDOWN}
_EXIT_REASONS = {
    libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN: "ended while libvirtd was down",
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "the guest shut down",
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "forced off through libvirt, not by the dispatcher",
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "QEMU crashed or was killed",
    libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: "migrated to another host",
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "saved to a file, not by the dispatcher",
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "QEMU did not start",
    libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT: "reverted to a snapshot, not by the dispatcher",
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: "ended while libvirtd was down",
}
#: Codes for which the console may contain the guest's own reason.
_GUEST_MAY_EXPLAIN = {
    libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON,
}
_PAUSE_DETAILS = {
    libvirt.VIR_DOMAIN_PAUSED_IOERROR: "paused by an error of one of its disks",
    libvirt.VIR_DOMAIN_PAUSED_CRASHED: "the guest crashed",
    libvirt.VIR_DOMAIN_PAUSED_SAVE: "its memory is being saved",
    libvirt.VIR_DOMAIN_PAUSED_SHUTTING_DOWN: "shutting down",
}

_DATA_DISK = re.compile(r"[/.]data(-\d+)?\.raw$")
_KINDS = libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_BLOCK
# NOWAIT leaves out a domain that is busy (being saved, for example).
_FLAGS = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT


def observation(found: DomainInfo | None) -> Observation:
    """Return the observation of an agent from its domain."""
    if found is None:
        return Observation(state=BackendState.ABSENT)
    label = found.label
    log_dir = domain_xml.log_dir_of(found.handle)
    state, reason, detail = BackendState.RUNNING, "", ""
    if not found.active:
        if found.saved:
            state = BackendState.HIBERNATED
        else:
            state = BackendState.STOPPED
            explained = logs.exit_reason(log_dir) if log_dir and found.reason in _GUEST_MAY_EXPLAIN else ""
            reason = explained or _EXIT_REASONS.get(found.reason, "ended")
    elif found.state == libvirt.VIR_DOMAIN_PAUSED:
        detail = "paused: the host's disk is full" if found.no_space else _PAUSE_DETAILS.get(found.reason, "")
        if found.reason == libvirt.VIR_DOMAIN_PAUSED_STARTING_UP:
            state = BackendState.STARTING
        elif found.reason == libvirt.VIR_DOMAIN_PAUSED_CRASHED:
            state, reason = BackendState.STOPPED, "the guest crashed"
        else:
            state = BackendState.SUSPENDED
    elif found.state == libvirt.VIR_DOMAIN_PMSUSPENDED:
        state, detail = BackendState.SUSPENDED, "the guest suspended itself"
    elif found.state == libvirt.VIR_DOMAIN_CRASHED:
        state, reason = BackendState.STOPPED, "the guest crashed"
    elif found.state not in _RUNNING:
        state = BackendState.STARTING
    elif log_dir and 0 <= (age := time.time() - label.started) < BOOTING:
        detail = logs.last_line(log_dir)
        if label.announce and age < ANNOUNCED and not logs.announced(log_dir, label.announce):
            state = BackendState.STARTING
    reachable = found.active and state in {BackendState.RUNNING, BackendState.SUSPENDED}
    return Observation(
        state=state,
        endpoint=endpoint(found) if reachable else None,
        started_at=label.started if found.active else None,
        spec_hash=label.spec,
        exit_reason=reason,
        detail=detail,
        oom_kills=logs.oom_kills(log_dir) if log_dir and found.active else 0,
    )


def endpoint(found: DomainInfo) -> Endpoint | None:
    """Return the endpoint of a running domain's app, None while it is unknown."""
    label = found.label
    if label.port:
        return Endpoint.tcp("127.0.0.1", label.port)
    if found.cid:
        return Endpoint.vsock(found.cid, label.guest_port)
    if label.address:
        return Endpoint.tcp(label.address, label.guest_port)
    return None


def usage(backend: Backend, names: Iterable[str], deadline: Deadline, *, local: bool) -> Mapping[str, Usage]:
    """Return the usage of running domains by name.

    :param local: their disks are files of this host.
    """
    wanted = set(names)

    def query(connection: libvirt.virConnect) -> dict[str, Usage]:
        stats = ((domain.name(), values) for domain, values in connection.getAllDomainStats(_KINDS, _FLAGS))
        return {name: usage_of(values, local=local) for name, values in stats if name in wanted}

    return backend.call(query, what="reading machines' usage", deadline=deadline) if wanted else {}


def usage_of(stats: Mapping[str, Any], *, local: bool) -> Usage:
    """Return what a domain's statistics say; of its disks, the data disk counts."""
    memory = stats.get("balloon.rss") or stats.get("balloon.current")
    disks = (f"block.{index}" for index in range(int(stats.get("block.count", 0))))
    data = next((disk for disk in disks if _DATA_DISK.search(stats.get(f"{disk}.path", ""))), "")
    used, limit = stats.get(f"{data}.allocation"), stats.get(f"{data}.capacity")
    if local and data:
        with suppress(OSError):  # libvirt counts up to the highest byte that QEMU has written
            used = os.stat(stats[f"{data}.path"]).st_blocks * 512
    cpu = stats.get("cpu.time")
    return Usage(
        memory=None if memory is None else int(memory) * 1024,
        cpu_seconds=None if cpu is None else int(cpu) / 1e9,
        disk=None if used is None else int(used),
        disk_limit=None if limit is None else int(limit),
    )


class Watch:
    """Reports the names of machines that changed; reconnects by itself, and reports "" after each gap.

    It has a connection of its own, and a thread that reopens it.
    """

    def __init__(self, backend: Backend, prefix: str, on_change: Callable[[str], None]) -> None:
        self._backend, self._prefix, self._on_change = backend, prefix, on_change
        self._wake = threading.Event()
        self._closed = False
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="libvirt-watch", daemon=True)
        self._thread.start()
        self._connected.wait(2.0)  # so that no change after the return of `watch` is missed

    def close(self) -> None:
        """See `Closeable`."""
        self._closed = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        gap = False
        while not self._closed:
            slot = Slot()
            try:
                self._watch(slot, gap=gap)
            except DispatcherError as error:
                _log.debug("watching machines: %s", error)
                self._wake.wait(_RETRY)
            finally:
                slot.close()
            gap = True

    def _watch(self, slot: Slot, *, gap: bool) -> None:
        """Report until the connection is lost or this is closed."""
        self._wake.clear()
        if self._closed:
            return
        call = functools.partial(self._backend.call, what="watching", lane=Lane.WORK, slot=slot)
        number = call(self._register, deadline=Deadline(_CONNECT))
        self._connected.set()
        try:
            if gap:
                self._report("")
            while not self._closed and not self._wake.wait(_CHECK) and slot.alive():
                pass
        finally:
            if slot.alive():
                call(functools.partial(_deregister, number=number), deadline=Deadline(_CONNECT))

    def _register(self, connection: libvirt.virConnect) -> int:
        connection.registerCloseCallback(lambda *_: self._wake.set(), None)
        kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        return int(connection.domainEventRegisterAny(None, kind, self._event, None))

    def _event(self, _: libvirt.virConnect, domain: libvirt.virDomain, *__: object) -> None:
        name = domain.name()
        if name.startswith(self._prefix):
            self._report(name)

    def _report(self, name: str) -> None:
        if self._closed:
            return
        try:
            self._on_change(name)
        except Exception:
            _log.exception("a watcher of machines failed")


def _deregister(connection: libvirt.virConnect, number: int) -> None:
    connection.unregisterCloseCallback()
    connection.domainEventDeregisterAny(number)
