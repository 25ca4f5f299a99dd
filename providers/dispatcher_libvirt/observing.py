"""From what libvirt says of a domain to an `Observation`.  Reads the last lines of consoles; otherwise pure."""

from __future__ import annotations

import time

import libvirt

from dispatcher.plugin import BackendState, Endpoint, Observation
from dispatcher_libvirt import console, plan
from dispatcher_libvirt.machines import Found

BOOTING = 120.0  # seconds after a start for which the console's last line is told
# QEMU accepts a connection before the guest has a network, and tries it again after 3, 9 and 21 s only: so nobody
# is told where to connect before the guest says that it is up, or so many seconds have passed.
ANNOUNCED = 30.0

_RUNNING = {libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED, libvirt.VIR_DOMAIN_SHUTDOWN}
_ENDED = {
    libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN: "ended while libvirtd was away",
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "the guest shut down",
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "ended by force through libvirt, not by the dispatcher",
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "QEMU crashed or was killed",
    libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: "migrated to another host",
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "saved to a file, not by the dispatcher",
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "QEMU did not start",
    libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT: "reverted to a snapshot, not by the dispatcher",
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: "ended while libvirtd was away",
}
#: Ends of which the guest itself may have told the reason on its console.
_TOLD = {
    libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON,
}
_PAUSED = {
    libvirt.VIR_DOMAIN_PAUSED_IOERROR: "stopped by an error of its disk: is the host's disk full?",
    libvirt.VIR_DOMAIN_PAUSED_CRASHED: "the guest crashed",
    libvirt.VIR_DOMAIN_PAUSED_SAVE: "its memory is being saved",
    libvirt.VIR_DOMAIN_PAUSED_SHUTTING_DOWN: "shutting down",
}

ABSENT = Observation(state=BackendState.ABSENT)


def observation(found: Found | None) -> Observation:
    """Return what a domain's state means for its agent."""
    if found is None or found.label is None:
        return ABSENT
    label = found.label
    logs = plan.log_dir_of(plan.handle_from(found.name, label))
    state, reason, detail = BackendState.RUNNING, "", ""
    if not found.active:
        if found.saved:
            state = BackendState.HIBERNATED
        else:
            state = BackendState.STOPPED
            said = console.ending(logs) if logs and found.reason in _TOLD else ""
            reason = said or _ENDED.get(found.reason, "ended")
    elif found.state == libvirt.VIR_DOMAIN_PAUSED:
        detail = _PAUSED.get(found.reason, "")
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
    elif logs and 0 <= (age := time.time() - label.started) < BOOTING:
        detail = console.last_line(logs)
        if label.announce and age < ANNOUNCED and not console.announced(logs, label.announce):
            state = BackendState.STARTING
    known = found.active and state in {BackendState.RUNNING, BackendState.SUSPENDED}
    return Observation(
        state=state,
        endpoint=endpoint(found) if known else None,
        started_at=label.started if found.active else None,
        spec_hash=label.spec,
        exit_reason=reason,
        detail=detail,
    )


def endpoint(found: Found) -> Endpoint | None:
    """Return where a running domain's app is reached, None while that is not known."""
    label = found.label
    if label is None:
        return None
    if label.port:
        return Endpoint.tcp("127.0.0.1", label.port)
    if found.cid:
        return Endpoint.vsock(found.cid, label.guest_port)
    if found.host:
        return Endpoint.tcp(found.host, label.guest_port)
    return None
