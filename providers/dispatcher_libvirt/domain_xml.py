"""Domain XML from a `Machine`, and a `Label` back from XML.  Pure; every value goes through lxml."""

from __future__ import annotations

import math
from typing import Any

from lxml import etree

from dispatcher_libvirt import extra_xml
from dispatcher_libvirt.domain import Disk, Label, LibvirtNetwork, Machine, UserNetwork

NAMESPACE = "urn:agent-dispatcher:libvirt:1"
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
PREFIX = "dispatcher"
#: What a user network gives to the guest (QEMU's own defaults); its DHCP server says the same.
GUEST_ADDRESS, GUEST_GATEWAY = "10.0.2.15", "10.0.2.2"
_REQUIRED = ("installation", "agent", "spec", "data")
_PERIOD = 100_000  # microseconds, of the processor quota
_SMALLEST_QUOTA = 1_000


def build(machine: Machine) -> str:
    """Return the domain XML.

    :raises ValueError: an extra element may not be added, or a text holds characters that XML cannot.
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
    extra_xml.apply(domain, machine.extra)
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
    """Return the label in a metadata element, as libvirt gives it; what an older release did not write is default.

    :raises ValueError: it is none, or a damaged one.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        element = etree.fromstring(text, parser)
        if element.tag not in {"agent", f"{{{NAMESPACE}}}agent"}:  # libvirt takes the namespace off
            raise ValueError("it is another element")
        values: dict[str, Any] = {key: element.attrib[key] for key in _REQUIRED}
        values |= {key: element.attrib[key] for key in Label.__dataclass_fields__ if key in element.attrib}
        for key, kind in (("started", float), ("port", int), ("guest_port", int)):
            values[key] = kind(values.get(key, 0))
        return Label(**values)
    except (etree.XMLSyntaxError, KeyError, ValueError) as error:
        raise ValueError(f"a damaged label: {error}") from error


def with_port(text: str, port: int) -> str:
    """Return the XML of a saved domain with another forwarded port.

    :raises ValueError: it is no domain with a forwarded port.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        domain = etree.fromstring(text, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"no XML: {error}") from error
    label = domain.find(f"metadata/{{{NAMESPACE}}}agent")
    if label is None or int(label.get("port", "0")) == 0:
        raise ValueError("no domain with a forwarded port")
    for argument in domain.iter(f"{{{QEMU}}}arg"):
        if argument.get("value", "").startswith("user,"):
            argument.set(
                "value", netdev(UserNetwork(host_port=port, guest_port=int(label.get("guest_port", "0"))))
            )
    label.set("port", str(port))
    return etree.tostring(domain, encoding="unicode")


def vsock_cid(text: str) -> int:
    """Return the vsock context id in a running domain's XML, 0 without one."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    cid = etree.fromstring(text, parser).find("devices/vsock/cid")
    return 0 if cid is None else int(cid.get("address", "0"))


def netdev(network: UserNetwork) -> str:
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
        # For the whole machine, emulation included, not for each of its processors.
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
        if unlabelled:  # shared by all machines, so libvirt must not give it to one of them
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
    bus = "pci.0" if machine.machine.startswith(("pc-i440fx", "pc")) and "q35" not in machine.machine else "pcie.0"
    command = etree.SubElement(domain, f"{{{QEMU}}}commandline")
    # The slot is given because libvirt numbers its own devices from 1 upwards without knowing of this one.
    device = f"virtio-net-pci,netdev=dispatcher0,mac={machine.mac},bus={bus},addr=0x10"
    for argument in ("-netdev", netdev(network), "-device", device):
        etree.SubElement(command, f"{{{QEMU}}}arg", {"value": argument})
