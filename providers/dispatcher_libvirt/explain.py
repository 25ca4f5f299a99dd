"""The isolation of machines in sentences, for `providers check`."""

from __future__ import annotations

from collections.abc import Iterator

from dispatcher.plugin import App, Finding, Network
from dispatcher_libvirt.host import Host
from dispatcher_libvirt.options import Options, options_of, unsupported_network


def backend(host: Host | None) -> Iterator[Finding]:
    """Yield findings for all apps.

    :param host: None while the backend has not answered.
    """
    yield Finding.ok(
        "Each agent is a virtual machine: it shares no kernel, memory, process or file with another agent"
    )
    yield Finding.warning(
        "Without a libvirt network an app is reached through a port on 127.0.0.1, which is open to every "
        "local user of this host",
        "allow no other users on this host, or use vsock or a libvirt network",
    )
    if host is None:
        yield Finding.info("The host's capabilities are unknown: libvirt has not answered yet", "start libvirtd")
        return
    if host.kind == "kvm":
        yield Finding.ok("Machines use hardware virtualisation (KVM)")
    else:
        yield Finding.warning(
            f"Machines are emulated and slow ({host.why_no_kvm}); QEMU does not promise that emulation withstands "
            "hostile guests",
            "enable virtualisation on this host (nested, on a virtual one)",
        )
    if host.own_users:
        yield Finding.ok(
            "Each machine's QEMU runs as its agent's own host user: a guest that breaks out of QEMU has no access "
            "to other agents' disks"
        )
    else:
        yield Finding.warning(
            "All machines' QEMUs run as one host user: only libvirt's security driver (AppArmor, SELinux) "
            f"protects other agents' disks from a guest that breaks out of QEMU: {host.why_not}",
            "run the manager as root, and see own_users",
        )
    yield Finding.info("The host reads machines' disks as the agent's user, in a sandbox without network")


def application(
    app: App, options: Options, host: Host | None, unbounded: tuple[str, str] | None = None
) -> Iterator[Finding]:
    """Yield findings for one app.

    :param unbounded: why the rate of machines' new connections is not bounded, and the fix; None if it is.
    """
    own = options_of(app)
    if unsupported_network(app, options):
        pass  # told by `faults`
    elif own.endpoint == "vsock":
        yield Finding.warning(
            "It is reached through vsock alone, and has no network, but it reaches services of this host that "
            "listen on AF_VSOCK",
            'let none listen there (ss --vsock -l), or set endpoint = "tcp"',
        )
    elif app.network is Network.NONE:
        yield Finding.ok("It has no outgoing network: not to this host, the outside or other machines")
    else:
        yield Finding.info(
            f"It reaches the outside through the libvirt network {options.network}; a network filter blocks "
            "access to this host (except DNS) and to other machines, prevents forged addresses, and bounds "
            "the number of connections"
        )
        if unbounded:
            why, fix = unbounded
            yield Finding.warning(
                "A machine can fill the table of tracked connections (nf_conntrack_max) by connections that it "
                f"opens and closes: {why}",
                fix,
            )
    if app.limits.demanded("pids"):
        yield Finding.warning(
            "Its limit of processes is not enforced: they exist only in the machine and are bounded by its memory",
            "remove `pids`",
        )
    if app.limits.swap:
        yield Finding.info("Its limit of swap has no effect: a machine has a fixed memory")
    if app.limits.cpus and host is not None and not host.cpu_limits:
        yield Finding.warning(
            "Its limit of processors is enforced in whole processors only: libvirt has no CPU control group",
            "set `cpus` to a whole number",
        )
    if app.credentials == "stdin" or app.environment or own.command:
        yield Finding.info(
            "Command, environment, secrets and credentials are on the cloud-init disk; its image must pass them "
            "to the app, as docs/howto/vm-images.md describes"
        )
    for text in own.xml:
        yield Finding.warning(
            f"The operator adds to its machine: {text}", "remove it from `xml` if it is not needed"
        )
