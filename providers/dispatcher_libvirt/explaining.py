"""What a machine isolates, and from what, in sentences.  Pure."""

from __future__ import annotations

from collections.abc import Iterator

from dispatcher.plugin import App, Finding, Level, Network
from dispatcher_libvirt.options import Options, options_of, unsupported_network
from dispatcher_libvirt.plan import Host


def _say(level: Level, *words: str, fix: str = "") -> Finding:
    return Finding(level=level, what=" ".join(words), fix=fix)


def backend(host: Host | None) -> Iterator[Finding]:
    """Yield what holds for all apps.

    :param host: None while the backend has not answered yet.
    """
    yield _say(
        Level.OK,
        "Each agent is a machine of its own: kernel, memory, processes and files are shared with nobody",
    )
    yield _say(
        Level.WARNING,
        "Without a libvirt network an app is reached through a port on 127.0.0.1,",
        "which is open to every local user of this host",
        fix="keep other people off this host, or use vsock or a libvirt network",
    )
    if host is None:
        yield _say(
            Level.INFO, "What the host can do is not known: libvirt has not answered yet", fix="start libvirtd"
        )
        return
    if host.kind == "kvm":
        yield _say(Level.OK, "Machines run on the processor itself, through KVM")
    else:
        yield _say(
            Level.WARNING,
            f"Machines are emulated, and slow ({host.why_no_kvm or 'KVM does not work'});",
            "QEMU does not promise that emulation withstands hostile guests",
            fix="enable virtualisation on this host (nested, on a virtual one)",
        )
    if host.own_users:
        yield _say(
            Level.OK,
            "Each machine's QEMU runs as its agent's own host user:",
            "who breaks out of one finds no other's disk",
        )
    else:
        yield _say(
            Level.WARNING,
            "All machines' QEMUs run as one host user: libvirt's security driver alone (AppArmor, SELinux)",
            f"keeps one that was broken out of from the others' disks: {host.why_not}",
        )
    yield _say(Level.INFO, "The host reads machines' disks as the agent's own user, in a sandbox without network")


def application(app: App, options: Options, host: Host | None) -> Iterator[Finding]:
    """Yield what holds for one app."""
    own = options_of(app)
    if why := unsupported_network(app, options):
        yield _say(Level.ERROR, f"Its network {app.network.value!r} cannot be had: {why}")
    elif own.endpoint == "vsock":
        yield _say(Level.OK, "It is reached through vsock alone, and reaches nothing")
    elif app.network is Network.NONE:
        yield _say(Level.OK, "It reaches nothing: neither this host nor the outside nor another machine")
    else:
        yield _say(
            Level.INFO,
            f"It reaches the outside through the libvirt network {options.network}; a network filter keeps it",
            "from this host (but for DHCP and DNS), from other machines, and from forging addresses",
        )
    if app.limits.pids:
        yield _say(
            Level.WARNING,
            "Its limit of processes is not enforced: they are the machine's own, which its memory bounds",
        )
    if app.limits.swap:
        yield _say(Level.INFO, "Its limit of swap has no meaning: a machine has its memory")
    if app.limits.cpus and host is not None and not host.cpu_limits:
        yield _say(
            Level.WARNING,
            "Its limit of processors is enforced in whole ones only: libvirt has no CPU control group",
        )
    if app.credentials == "stdin" or app.environment or own.command:
        yield _say(
            Level.INFO,
            "Command, environment, secrets and credentials come on a seed disk; its image must hand them on to",
            "the app, as docs/howto/vm-images.md says",
        )
    for text in own.xml:
        yield _say(Level.WARNING, f"The operator adds to its machine: {text}")
