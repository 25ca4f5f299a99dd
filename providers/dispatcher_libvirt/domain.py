"""A machine's description, typed.  Pure: `domain_xml` writes it, `plan` makes it from an agent's spec."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

#: Serial numbers by which a guest finds its disks (/dev/disk/by-id/virtio-...; at most 20 characters).
ROOT, DATA, SEED = "dispatcher-root", "dispatcher-data", "dispatcher-seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One virtio disk.

    :ivar backing: path and format of the base image of an overlay, given explicitly so that nothing is probed.
    """

    path: Path
    format: str
    serial: str
    readonly: bool = False
    backing: tuple[Path, str] | None = None
    bytes_per_second: int | None = None
    iops: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UserNetwork:
    """QEMU's own network: one port of 127.0.0.1 leads in, nothing leads out."""

    host_port: int
    guest_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtNetwork:
    """An interface on a libvirt network, kept from the other guests on it and from forging addresses.

    :ivar filter: name of the network filter that keeps it from the host.
    """

    name: str
    filter: str
    bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vsock:
    """A vsock device; libvirt chooses the context id.  There is no network interface then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The host user as whom a machine's QEMU runs; the provider labels the files itself."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What the provider keeps with a domain, as metadata: enough to adopt the agent.

    :ivar port: forwarded port on 127.0.0.1, 0 without; :ivar guest_port: where the app listens in the guest.
    :ivar data: `Handle.data` as JSON text; :ivar announce: what the console says once the network is up.
    :ivar guest_agent: "yes" where the guest runs the QEMU guest agent.
    """

    installation: str
    agent: str
    spec: str
    started: float
    data: str
    port: int = 0
    guest_port: int = 0
    network: str = ""
    announce: str = ""
    guest_agent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """Direct boot, or (with no kernel) the root disk's own boot loader."""

    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    firmware: str = "bios"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything that a domain is.

    :ivar kind: ``kvm`` or ``qemu``; :ivar memory, balloon: bytes.
    :ivar translation_cache: bytes that an emulator keeps of translated code, None for QEMU's own choice.
    :ivar cpu_quota: processors that it may use on the host, None without a limit.
    :ivar console: file for the serial console's output, None for none; :ivar owner: None leaves it to libvirt.
    """

    name: str
    uuid: str
    label: Label
    kind: str
    arch: str
    machine: str
    cpu: str
    vcpus: int
    memory: int
    console: Path | None
    boot: Boot
    disks: tuple[Disk, ...]
    network: UserNetwork | LibvirtNetwork | Vsock
    mac: str
    balloon: int | None = None
    translation_cache: int | None = None
    cpu_quota: float | None = None
    cpu_shares: int | None = None
    owner: Owner | None = None
    guest_agent: bool = False
    extra: list[str] = field(default_factory=list)
