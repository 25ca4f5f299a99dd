"""A machine's description, and its libvirt domain XML.  Every value goes through lxml."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lxml import etree

NAMESPACE = "urn:agent-dispatcher:libvirt:1"
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
PREFIX = "dispatcher"
#: What a user network gives to the guest (QEMU's own defaults); its DHCP server says the same.
GUEST_ADDRESS, GUEST_GATEWAY = "10.0.2.15", "10.0.2.2"
_REQUIRED = ("installation", "agent", "spec", "data")
_PERIOD = 100_000  # microseconds, of the processor quota
_SMALLEST_QUOTA = 1_000
#: Serial numbers by which a guest finds its disks (/dev/disk/by-id/virtio-...; at most 20 characters).
ROOT_SERIAL, DATA_SERIAL, CLOUD_INIT_SERIAL = "dispatcher-root", "dispatcher-data", "dispatcher-seed"
#: Elements that an operator may add under <domain>; an existing one is replaced.
DOMAIN_ELEMENTS = frozenset(
    {"cpu", "clock", "features", "iothreads", "iothreadids", "memoryBacking", "numatune", "pm", "sysinfo"}
    | {"keywrap", "launchSecurity", "perf", "blkiotune", "genid"}
)
#: Elements that an operator may add under <devices>.
DEVICE_ELEMENTS = frozenset(
    {"hostdev", "rng", "tpm", "watchdog", "video", "graphics", "input", "sound", "audio", "controller", "iommu"}
    | {"shmem", "smartcard", "hub", "redirdev", "filesystem", "channel", "memory", "crypto"}
)
_MAX_EXTRA = 16 * 1024  # characters of one added element


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One virtio disk.

    :ivar backing: path and format of an overlay's base image, explicit so that QEMU probes nothing.
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
    """QEMU's user network: one port of 127.0.0.1 is forwarded, and nothing leads out."""

    host_port: int
    guest_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtNetwork:
    """An interface on a libvirt network, isolated from the other guests there.

    :ivar filter: name of the network filter that protects the host and prevents forged addresses.
    """

    name: str
    filter: str
    bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vsock:
    """A vsock device, without a network interface; libvirt chooses the context id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The host user that a machine's QEMU runs as; the provider sets the files' owner itself."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Metadata of a domain: enough to adopt the agent.

    :ivar port: forwarded port on 127.0.0.1, 0 without one; :ivar guest_port: the app's port in the guest.
    :ivar data: `Handle.data` as JSON text; :ivar announce: console text that reports a working network.
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
    """Direct boot, or (without a kernel) the root disk's boot loader."""

    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    firmware: str = "bios"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The description of a domain.

    :ivar kind: ``kvm`` or ``qemu``; :ivar memory, balloon: bytes.
    :ivar translation_cache: bytes of translated code that an emulator caches, None for QEMU's default.
    :ivar cpu_quota: processors that it may use on the host, None without a limit.
    :ivar console: file for the serial console's output; :ivar owner: None leaves the user to libvirt.
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


def build(machine: Machine) -> str:
    """Return the domain XML.

    :raises ValueError: an extra element is not allowed, or a text holds characters that XML cannot express.
    """
    domain = etree.Element("domain", {"type": machine.kind}, nsmap={"qemu": QEMU})
    _add(domain, "name", machine.name)
    _add(domain, "uuid", machine.uuid)
    _add(domain, "metadata").append(label_element(machine.label))
    _add(domain, "memory", machine.memory // 1024, unit="KiB")
    _add(domain, "currentMemory", min(machine.balloon or machine.memory, machine.memory) // 1024, unit="KiB")
    _add(domain, "vcpu", machine.vcpus)
    _cpu_limits(domain, machine)
    _boot(domain, machine)
    features = _add(domain, "features")
    _add(features, "acpi")
    if machine.arch == "x86_64":
        _add(features, "apic")
    if machine.translation_cache is not None:
        _add(_add(features, "tcg"), "tb-cache", machine.translation_cache >> 20, unit="MiB")
    _cpu(domain, machine)
    clock = _add(domain, "clock", offset="utc")
    _add(clock, "timer", name="rtc", tickpolicy="catchup")
    _add(domain, "on_poweroff", "destroy")
    _add(domain, "on_reboot", "restart")
    _add(domain, "on_crash", "destroy")
    _devices(domain, machine)
    if machine.owner:
        label = _add(domain, "seclabel", type="static", model="dac", relabel="no")
        _add(label, "label", f"+{machine.owner.uid}:+{machine.owner.gid}")
    _add_extra(domain, machine.extra)
    if isinstance(machine.network, UserNetwork):
        _user_network(domain, machine, machine.network)
    return etree.tostring(domain, encoding="unicode", pretty_print=True)


def label_element(label: Label) -> etree._Element:
    """Return the metadata element of a domain."""
    element = etree.Element(f"{{{NAMESPACE}}}agent", nsmap={PREFIX: NAMESPACE})
    for key in Label.__dataclass_fields__:
        value = getattr(label, key)
        element.set(key, f"{value:.3f}" if isinstance(value, float) else str(value))
    return element


def parse_label(text: str) -> Label:
    """Return the label in a metadata element from libvirt; fields that an older release did not write are default.

    :raises ValueError: it is not a label, or damaged.
    """
    try:
        element = parse_xml(text)
        if element.tag not in {"agent", f"{{{NAMESPACE}}}agent"}:  # libvirt removes the namespace
            raise ValueError("another element")
        values: dict[str, Any] = {key: element.attrib[key] for key in _REQUIRED}
        values |= {key: element.attrib[key] for key in Label.__dataclass_fields__ if key in element.attrib}
        for key, kind in (("started", float), ("port", int), ("guest_port", int)):
            values[key] = kind(values.get(key, 0))
        return Label(**values)
    except (KeyError, ValueError) as error:
        raise ValueError(f"a damaged label: {error}") from error


def with_port(text: str, port: int) -> str:
    """Return the XML of a saved domain with another forwarded port.

    :raises ValueError: it is not a domain with a forwarded port.
    """
    domain = parse_xml(text)
    label = domain.find(f"metadata/{{{NAMESPACE}}}agent")
    if label is None or int(label.get("port", "0")) == 0:
        raise ValueError("not a domain with a forwarded port")
    for argument in domain.iter(f"{{{QEMU}}}arg"):
        if argument.get("value", "").startswith("user,"):
            network = UserNetwork(host_port=port, guest_port=int(label.get("guest_port", "0")))
            argument.set("value", _netdev(network))
    label.set("port", str(port))
    return etree.tostring(domain, encoding="unicode")


def vsock_cid(text: str) -> int:
    """Return the vsock context id in a running domain's XML, 0 without one."""
    cid = parse_xml(text).find("devices/vsock/cid")
    return 0 if cid is None else int(cid.get("address", "0"))


def parse_xml(text: str) -> etree._Element:
    """Return the root element of a document, parsed without entities, DTD and network.

    :raises ValueError: it is not well-formed.
    """
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True, remove_pis=True
    )
    try:
        return etree.fromstring(text, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"not well-formed XML: {error}") from error


def _netdev(network: UserNetwork) -> str:
    """Return QEMU's description of a user network.  Only numbers go in."""
    forward = f"tcp:127.0.0.1:{network.host_port:d}-{GUEST_ADDRESS}:{network.guest_port:d}"
    return f"user,id=dispatcher0,restrict=on,ipv6=off,hostfwd={forward}"


def _add(parent: etree._Element, tag: str, text: object = None, **attributes: object) -> etree._Element:
    element = etree.SubElement(parent, tag, {key.rstrip("_"): str(value) for key, value in attributes.items()})
    if text is not None:
        element.text = str(text)
    return element


def _cpu_limits(domain: etree._Element, machine: Machine) -> None:
    if machine.cpu_quota is None and machine.cpu_shares is None:
        return
    tune = _add(domain, "cputune")
    if machine.cpu_shares is not None:
        _add(tune, "shares", machine.cpu_shares)
    if machine.cpu_quota is not None:
        # For the whole machine including emulation, not for each virtual processor.
        _add(tune, "global_period", _PERIOD)
        _add(tune, "global_quota", max(_SMALLEST_QUOTA, math.ceil(machine.cpu_quota * _PERIOD)))


def _boot(domain: etree._Element, machine: Machine) -> None:
    boot = machine.boot
    system = _add(domain, "os")
    if boot.firmware == "efi":
        system.set("firmware", "efi")
    _add(system, "type", "hvm", arch=machine.arch, machine=machine.machine)
    if boot.kernel:
        _add(system, "kernel", boot.kernel)
        if boot.initrd:
            _add(system, "initrd", boot.initrd)
        if boot.cmdline:
            _add(system, "cmdline", boot.cmdline)
    else:
        _add(system, "boot", dev="hd")


def _cpu(domain: etree._Element, machine: Machine) -> None:
    model = machine.cpu
    if model == "auto":
        model = "host-passthrough" if machine.kind == "kvm" else "maximum"
    if model in {"host-passthrough", "host-model", "maximum"}:
        _add(domain, "cpu", mode=model)
    else:
        cpu = _add(domain, "cpu", mode="custom", match="exact", check="none")
        _add(cpu, "model", model, fallback="forbid")


def _devices(domain: etree._Element, machine: Machine) -> None:
    devices = _add(domain, "devices")
    _add(devices, "controller", type="usb", model="none")
    for index, disk in enumerate(machine.disks):
        _disk(devices, disk, f"vd{chr(ord('a') + index)}", unlabelled=machine.owner is None)
    serial = _add(devices, "serial", type="file" if machine.console else "pty")
    if machine.console:
        _add(serial, "source", path=machine.console, append="on")
    _add(serial, "target", port=0)
    if machine.guest_agent:
        channel = _add(devices, "channel", type="unix")
        _add(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    if isinstance(machine.network, LibvirtNetwork):
        _interface(devices, machine, machine.network)
    elif not isinstance(machine.network, UserNetwork):
        vsock = _add(devices, "vsock", model="virtio")
        _add(vsock, "cid", auto="yes")
    balloon = _add(devices, "memballoon", model="virtio", autodeflate="on", freePageReporting="on")
    _add(balloon, "stats", period=10)
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")
    if machine.arch == "x86_64":
        _add(devices, "panic", model="isa")


def _disk(devices: etree._Element, disk: Disk, target: str, *, unlabelled: bool) -> None:
    element = _add(devices, "disk", type="file", device="disk")
    driver = _add(element, "driver", name="qemu", type=disk.format)
    if not disk.readonly:
        driver.set("discard", "unmap")
    _add(element, "source", file=disk.path)
    if disk.backing:
        path, kind = disk.backing
        backing = _add(element, "backingStore", type="file")
        _add(backing, "format", type=kind)
        source = _add(backing, "source", file=path)
        if unlabelled:  # shared by all machines: libvirt must not change its owner to one of them
            _add(source, "seclabel", model="dac", relabel="no")
        _add(backing, "backingStore")
    elif disk.format != "raw":
        _add(element, "backingStore")
    _add(element, "target", dev=target, bus="virtio")
    if disk.bytes_per_second or disk.iops:
        tune = _add(element, "iotune")
        if disk.bytes_per_second:
            _add(tune, "total_bytes_sec", disk.bytes_per_second)
        if disk.iops:
            _add(tune, "total_iops_sec", disk.iops)
    if disk.readonly:
        _add(element, "readonly")
    _add(element, "serial", disk.serial)


def _interface(devices: etree._Element, machine: Machine, network: LibvirtNetwork) -> None:
    interface = _add(devices, "interface", type="network")
    _add(interface, "mac", address=machine.mac)
    _add(interface, "source", network=network.name)
    _add(interface, "port", isolated="yes")
    _add(interface, "filterref", filter=network.filter)
    _add(interface, "model", type="virtio")
    if network.bytes_per_second:
        bandwidth = _add(interface, "bandwidth")
        for direction in ("inbound", "outbound"):
            _add(bandwidth, direction, average=max(1, network.bytes_per_second // 1024))


def _user_network(domain: etree._Element, machine: Machine, network: UserNetwork) -> None:
    bus = "pci.0" if machine.machine.startswith("pc") and "q35" not in machine.machine else "pcie.0"
    command = etree.SubElement(domain, f"{{{QEMU}}}commandline")
    # An explicit slot: libvirt numbers its own devices from 1 upwards and does not see this one.
    device = f"virtio-net-pci,netdev=dispatcher0,mac={machine.mac},bus={bus},addr=0x10"
    for argument in ("-netdev", _netdev(network), "-device", device):
        etree.SubElement(command, f"{{{QEMU}}}arg", {"value": argument})


def parse_extra(text: str) -> etree._Element:
    """Return an element that an operator adds to the domain.

    The provider's own subjects stay out: identity, memory, disks, network, labels.  libvirt checks the whole
    against its schema.

    :raises ValueError: it is not exactly one well-formed element of an allowed kind.
    """
    if len(text) > _MAX_EXTRA:
        raise ValueError(f"at most {_MAX_EXTRA} characters of XML")
    try:
        element = parse_xml(text)
    except ValueError as error:
        raise ValueError(f"one well-formed XML element ({error})") from error
    if "<!DOCTYPE" in text:
        raise ValueError("an XML element without a document type")
    for inner in element.iter():
        if not isinstance(inner.tag, str) or inner.tag.startswith("{"):
            raise ValueError("plain XML elements, without namespaces and entities")
    if element.tag not in DOMAIN_ELEMENTS | DEVICE_ELEMENTS:
        allowed = ", ".join(sorted(DOMAIN_ELEMENTS | DEVICE_ELEMENTS))
        raise ValueError(f"an element of the domain that may be added, not <{element.tag}>: one of {allowed}")
    return element


def _add_extra(domain: etree._Element, texts: list[str]) -> None:
    devices = domain.find("devices")
    assert devices is not None
    for text in texts:
        element = parse_extra(text)
        known = domain.find(element.tag)
        if element.tag in DEVICE_ELEMENTS:
            devices.append(element)
        elif known is None:
            devices.addprevious(element)
        else:
            domain.replace(known, element)
