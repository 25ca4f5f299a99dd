"""Suspending and stopping machines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

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
from dispatcher_libvirt.domains import DomainInfo, Domains, act_if_active

FLUSH = 5.0  # seconds for a guest to write its disks, where the app does not configure it
_POLL = 0.1
_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


def suspend(domains: Domains, handle: Handle, depth: Depth, deadline: Deadline, progress: Progress) -> None:
    """See `Provider.suspend`."""
    found = domains.find(handle.name, deadline)
    if found is None:
        raise NotFound(f"The machine {handle.name} does not exist", fix="start the agent")
    if not found.active:
        if found.saved and depth is Depth.DISK:
            return
        raise Conflict(
            f"The machine {handle.name} does not run",
            why="its memory is saved on disk" if found.saved else "it has ended",
            fix="wake it first" if found.saved else "start the agent",
        )
    if depth is Depth.RAM:
        if found.state != libvirt.VIR_DOMAIN_PAUSED:
            progress("pausing the machine")
            domains.act(handle.name, libvirt.virDomain.suspend, what="pausing", deadline=deadline)
        return
    progress("saving its memory")
    try:
        # A machine that is paused when it is saved still runs after it is woken.
        domains.act(
            handle.name,
            lambda domain: domain.managedSave(libvirt.VIR_DOMAIN_SAVE_RUNNING),
            what="saving",
            deadline=deadline,
            tick=partial(progress, "saving its memory"),
        )
    except (Cancelled, DeadlineExceeded):
        _abort_save(domains, handle.name)
        raise


def _abort_save(domains: Domains, name: str) -> None:
    """Abort a save: the machine goes on."""
    try:
        domains.act(name, libvirt.virDomain.abortJob, what="aborting the save of", deadline=Deadline(5))
        end = Deadline(10)
        while not end.expired:
            found = domains.find(name, end)
            if found is None or not found.active or found.state != libvirt.VIR_DOMAIN_PAUSED:
                return
            time.sleep(_POLL)
    except DispatcherError as error:
        _log.debug("%s: the save was not aborted: %s", name, error)


def stop(
    domains: Domains,
    handle: Handle,
    *,
    wake: Callable[[DomainInfo], None],
    grace: float,
    deadline: Deadline,
    progress: Progress,
) -> None:
    """Stop a machine: the power button, again after `grace`, later by force.  Then undefine it.

    The second press means *at once* to guests that follow docs/howto/vm-images.md.  Force loses what the guest has
    not written, so a machine that is saved on disk is woken first.
    """
    found = domains.find(handle.name, deadline)
    if found is None:
        return
    if found.saved and not found.active:
        try:
            wake(found)
            found = domains.find(handle.name, deadline)
        except ProviderError as error:
            _log.warning("%s: removed without a wake-up, unwritten data is lost: %s", handle.name, error)
    if found is not None and found.active:
        progress("shutting down")
        if found.state == libvirt.VIR_DOMAIN_PAUSED:
            domains.act(handle.name, libvirt.virDomain.resume, what="waking", deadline=deadline)
        for seconds in (grace, float(handle.data.get("flush", FLUSH))):
            domains.act(handle.name, _press_power_button, what="shutting down", deadline=deadline)
            if _ended(domains, handle, seconds, deadline, progress):
                break
        else:
            progress("forcing it off")
    domains.remove(handle.name, deadline)


def _press_power_button(domain: libvirt.virDomain) -> None:
    act_if_active(lambda: domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN))


def _ended(domains: Domains, handle: Handle, seconds: float, deadline: Deadline, progress: Progress) -> bool:
    """Whether a machine ends within the time."""
    end, report = deadline.bounded(seconds), Deadline(0.5)
    while True:
        found = domains.find(handle.name, deadline)
        if found is None or not found.active:
            return True
        if end.expired:
            if deadline.expired:
                raise DeadlineExceeded(f"The machine {handle.name} did not end in time")
            return False
        if report.expired:
            progress("shutting down")
            report = Deadline(0.5)
        time.sleep(min(_POLL, end.remaining()))
