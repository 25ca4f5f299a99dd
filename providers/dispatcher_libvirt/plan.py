"""From an agent's spec to its machine.  Pure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.plugin import AgentSpec, ConfigError, Handle, Unsupported
from dispatcher_libvirt import domain
from dispatcher_libvirt.domain import Boot, Disk, Label, LibvirtNetwork, Machine, Owner, UserNetwork, Vsock
from dispatcher_libvirt.network import mac_address
from dispatcher_libvirt.options import (
    AppOptions,
    Options,
    disk_of,
    memory_of,
    options_of,
    unsupported_network,
    vcpus_of,
)

PROVIDER = "libvirt"
# An emulator keeps the code that it has translated, up to a gibibyte of it unless it is told otherwise: more than
# most guests have.  What does not fit is translated again.
TRANSLATION_CACHE = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What `check` found out about the backend.

    :ivar kind: ``kvm`` or ``qemu``; :ivar qemu: user and group that libvirt runs QEMU as.
    :ivar own_users: each machine's QEMU runs as its agent's own user; :ivar why_not: why that is not so.
    :ivar cpu_limits: libvirt has a CPU controller; :ivar vsock: the host has vhost-vsock.
    :ivar bounded_cache: machines are emulated, and the memory that this takes beside their own can be bounded.
    """

    kind: str
    arch: str
    qemu: tuple[int, int] | None
    own_users: bool
    why_not: str
    cpu_limits: bool
    vsock: bool
    why_no_kvm: str = ""
    bounded_cache: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Where a machine's files are, as QEMU's host sees them."""

    root: Path | None
    data: Path
    seed: Path


def handle_of(spec: AgentSpec, *, remote: bool) -> Handle:
    """Return an agent's handle: enough to find its machine, disks and logs again.

    :param remote: the machine is another host's: there are no logs, and a tunnel ends at the agent's socket.
    """
    data: dict[str, Any] = {
        "uid": spec.uid,
        "gid": spec.gid,
        "disk": disk_of(spec.app),
        "flush": options_of(spec.app).flush,
    }
    data |= {"socket": str(spec.socket), "proxy": spec.proxy_gid} if remote else {"logs": str(spec.log_dir)}
    return Handle(provider=PROVIDER, agent=spec.agent, name=spec.backend_name, data=data)


def log_dir_of(handle: Handle) -> Path | None:
    """Return the log directory of a handle, None where an older release kept none."""
    value = handle.data.get("logs")
    return Path(value) if isinstance(value, str) and value.startswith("/") else None


def size_of(handle: Handle) -> int:
    """Return the bytes that the data disk of a handle's agent should have, 0 where it does not say."""
    value = handle.data.get("disk")
    return value if isinstance(value, int) else 0


def user_of(handle: Handle) -> tuple[int, int] | None:
    """Return the host user and group of a handle's agent."""
    uid, gid = handle.data.get("uid"), handle.data.get("gid")
    return (uid, gid) if isinstance(uid, int) and isinstance(gid, int) else None


def handle_from(name: str, label: Label) -> Handle:
    """Return the handle that a label was made from."""
    data: Any = json.loads(label.data or "{}")
    return Handle(provider=PROVIDER, agent=label.agent, name=name, data=data if isinstance(data, dict) else {})


def check_spec(spec: AgentSpec, options: Options, host: Host) -> None:
    """Refuse what a machine cannot be.

    :raises Unsupported: a network that cannot be had; :raises ConfigError: options that contradict each other.
    """
    app, own = spec.app, options_of(spec.app)
    if why := unsupported_network(app, options):
        raise Unsupported(f'apps.{app.name}.network = "{app.network.value}" cannot be had', why=why)
    on_network = app.network.value == "private"
    if own.network_bandwidth and not on_network:
        raise ConfigError(
            f"apps.{app.name}.libvirt.network_bandwidth has no effect",
            why="QEMU's own network cannot be limited",
            fix='use network = "private" with providers.libvirt.network, or remove it',
        )
    if own.endpoint == "vsock":
        if on_network:
            raise ConfigError(f'apps.{app.name}.libvirt.endpoint = "vsock" comes without a network')
        if not host.vsock:
            raise Unsupported(
                f'apps.{app.name}.libvirt.endpoint = "vsock" cannot be had',
                why="the host has no /dev/vhost-vsock",
                fix='load the kernel module vhost_vsock, or use endpoint = "tcp"',
            )
    for text in (spec.agent, spec.user, own.cmdline, own.announce, *own.command):
        if any(not (char.isprintable() or char in "\t\n") for char in text):
            raise ConfigError(f"apps.{app.name}.libvirt: control characters cannot be in a machine's description")
    memory_of(app)
    disk_of(app)


def machine_of(
    spec: AgentSpec,
    *,
    host: Host,
    paths: Paths,
    console: Path | None,
    port: int,
    started: float,
    network: str,
    network_filter: str,
) -> Machine:
    """Return the machine of an agent, with a new identity.

    :param console: file for its console, None on another host.
    :param port: on 127.0.0.1 for QEMU's own network, else 0.
    """
    app, options = spec.app, options_of(spec.app)
    handle = handle_of(spec, remote=console is None)
    label = Label(
        installation=spec.installation,
        agent=spec.agent,
        spec=spec.hash,
        started=started,
        data=json.dumps(dict(handle.data), sort_keys=True),
        port=port,
        guest_port=options.port,
        network=network,
        announce=options.announce if port and console else "",
        guest_agent="yes" if options.guest_agent else "",
    )
    way_in: UserNetwork | LibvirtNetwork | Vsock
    if options.endpoint == "vsock":
        way_in = Vsock()
    elif network:
        way_in = LibvirtNetwork(name=network, filter=network_filter, bytes_per_second=options.network_bandwidth)
    else:
        way_in = UserNetwork(host_port=port, guest_port=options.port)
    return Machine(
        name=spec.backend_name,
        uuid=str(uuid.uuid4()),
        label=label,
        kind=host.kind,
        arch=host.arch,
        machine=options.machine,
        cpu=options.cpu,
        vcpus=vcpus_of(app),
        memory=memory_of(app),
        balloon=options.balloon,
        translation_cache=TRANSLATION_CACHE if host.bounded_cache else None,
        console=console,
        boot=Boot(
            kernel=options.kernel,
            initrd=options.initrd,
            cmdline=options.cmdline if options.kernel else "",
            firmware=options.firmware,
        ),
        disks=_disks(options, paths),
        network=way_in,
        mac=mac_address(spec.backend_name),
        cpu_quota=app.limits.cpus if host.cpu_limits else None,
        cpu_shares=options.cpu_shares if host.cpu_limits else None,
        owner=Owner(uid=spec.uid, gid=host.qemu[1]) if host.own_users and host.qemu else None,
        guest_agent=options.guest_agent,
        extra=list(options.xml),
    )


def _disks(options: AppOptions, paths: Paths) -> tuple[Disk, ...]:
    tuned: Mapping[str, Any] = {"bytes_per_second": options.disk_bandwidth, "iops": options.disk_iops}
    disks = []
    if paths.root is not None and options.image is not None:
        backing = (options.image, options.format)
        disks.append(Disk(path=paths.root, format="qcow2", serial=domain.ROOT, backing=backing, **tuned))
    disks.append(Disk(path=paths.data, format="raw", serial=domain.DATA, **tuned))
    disks.append(Disk(path=paths.seed, format="raw", serial=domain.SEED, readonly=True))
    return tuple(disks)
