"""Suspending, stopping and destroying machines.  Touches libvirt through `Machines`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import libvirt

from dispatcher.plugin import (
    Cancelled,
    Conflict,
    Deadline,
    DeadlineExceeded,
    Depth,
    DispatcherError,
    Handle,
    NotFound,
    Progress,
    ProviderError,
)
from dispatcher_libvirt.machines import Found, Machines

FLUSH = 5.0  # seconds for a guest to write its disks, where its app does not say otherwise
_POLL = 0.1
_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


def suspend(machines: Machines, handle: Handle, depth: Depth, deadline: Deadline, progress: Progress) -> None:
    """See `Provider.suspend`."""
    found = machines.ours(machines.find(handle.name, deadline))
    if found is None:
        raise NotFound(f"The machine {handle.name} does not exist", fix="start the agent")
    if not found.active:
        if found.saved and depth is Depth.DISK:
            return
        raise Conflict(
            f"The machine {handle.name} does not run",
            why="its memory lies on disk" if found.saved else "it has ended",
            fix="wake it first" if found.saved else "start the agent",
        )
    if depth is Depth.RAM:
        if found.state != libvirt.VIR_DOMAIN_PAUSED:
            progress("pausing the machine")
            machines.act(handle.name, _pause, what="pausing", deadline=deadline)
        return
    progress("saving its memory")
    try:
        machines.act(
            handle.name, _save, what="saving", deadline=deadline, tick=lambda: progress("saving its memory")
        )
    except (Cancelled, DeadlineExceeded):
        _abort_save(machines, handle.name)
        raise


def _pause(domain: libvirt.virDomain) -> None:
    domain.suspend()


def _save(domain: libvirt.virDomain) -> None:
    # Whatever it did when it was saved, it runs when it is woken.
    domain.managedSave(libvirt.VIR_DOMAIN_SAVE_RUNNING)


def _abort_save(machines: Machines, name: str) -> None:
    """End a save under way: the machine goes on as if nothing had been."""
    try:
        machines.act(name, lambda domain: domain.abortJob(), what="not saving", deadline=Deadline(5))
        end = Deadline(10)
        while not end.expired:
            found = machines.find(name, end)
            if found is None or not found.active or found.state != libvirt.VIR_DOMAIN_PAUSED:
                return
            time.sleep(_POLL)
    except DispatcherError as error:
        _log.debug("%s: a save could not be ended: %s", name, error)


def stop(
    machines: Machines,
    handle: Handle,
    *,
    wake: Callable[[Found], None],
    grace: float,
    deadline: Deadline,
    progress: Progress,
) -> None:
    """End a machine: the power button, again after `grace`, and by force a while later.  Then forget it.

    The second press means *at once* to guests that follow the convention of docs/howto/vm-images.md; force is the
    power cut, which loses what the guest has not written.  So one that was saved to disk is woken first.
    """
    found = machines.ours(machines.find(handle.name, deadline))
    if found is None:
        return
    if found.saved and not found.active:
        try:
            wake(found)
            found = machines.ours(machines.find(handle.name, deadline))
        except ProviderError as error:
            _log.warning("%s: ended without being woken, unwritten data is lost: %s", handle.name, error)
    if found is not None and found.active:
        progress("shutting down")
        if found.state == libvirt.VIR_DOMAIN_PAUSED:
            machines.act(handle.name, lambda domain: domain.resume(), what="waking", deadline=deadline)
        for seconds in (grace, _flush(handle)):
            machines.act(handle.name, _press, what="shutting down", deadline=deadline)
            if _ended(machines, handle, seconds, deadline, progress):
                break
        else:
            progress("ending by force")
    machines.remove(handle.name, deadline)


def _flush(handle: Handle) -> float:
    value = handle.data.get("flush", FLUSH)
    return float(value) if isinstance(value, (int, float)) else FLUSH


def _press(domain: libvirt.virDomain) -> None:
    try:
        domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:  # it has just ended
            raise


def _ended(machines: Machines, handle: Handle, seconds: float, deadline: Deadline, progress: Progress) -> bool:
    """Whether a machine ends within so many seconds."""
    end, told = deadline.bounded(seconds), Deadline(0.5)
    while True:
        if not _runs(machines.find(handle.name, deadline)):
            return True
        if end.expired:
            if deadline.expired:
                raise DeadlineExceeded(f"The machine {handle.name} did not end in time")
            return False
        if told.expired:
            progress("shutting down")
            told = Deadline(0.5)
        time.sleep(min(_POLL, end.remaining()))


def _runs(found: Found | None) -> bool:
    return found is not None and found.active
