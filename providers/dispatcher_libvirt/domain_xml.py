"""Domain XML of an agent's machine, and the label in its metadata.  Every value goes through lxml."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lxml import etree

from dispatcher.plugin import AgentSpec, Handle
from dispatcher_libvirt.handles import PROVIDER, handle_of
from dispatcher_libvirt.host import Host
from dispatcher_libvirt.network import mac_address
from dispatcher_libvirt.options import memory_of, options_of, vcpus_of
from dispatcher_libvirt.xml_input import DEVICE_ELEMENTS, parse_extra, parse_xml

NAMESPACE = "urn:agent-dispatcher:libvirt:1"
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
PREFIX = "dispatcher"
#: The guest's addresses on QEMU's user network (QEMU's defaults); its DHCP server assigns the same.
GUEST_ADDRESS, GUEST_GATEWAY = "10.0.2.15", "10.0.2.2"
#: Serial numbers by which a guest finds its disks (/dev/disk/by-id/virtio-...; at most 20 characters).
ROOT_SERIAL, DATA_SERIAL, CLOUD_INIT_SERIAL = "dispatcher-root", "dispatcher-data", "dispatcher-seed"
_REQUIRED = ("installation", "agent", "spec", "data")
# Without a limit an emulator caches up to a gibibyte of translated code: more than most guests have.  A smaller
# cache costs repeated translation.
_TRANSLATION_CACHE = 64  # MiB
_PERIOD = 100_000  # microseconds, of the processor quota
_SMALLEST_QUOTA = 1_000


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

    def handle(self, name: str) -> Handle:
        """Return the handle of the agent.

        :param name: of the domain.
        """
        data: Any = json.loads(self.data or "{}")
        return Handle(provider=PROVIDER, agent=self.agent, name=name, data=data if isinstance(data, dict) else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The parameters of one start of a machine, besides the agent's specification.

    :ivar root, data, cloud_init: paths of the disks on QEMU's host.
    :ivar console: file for the serial console's output, None on another host.
    :ivar port: forwarded port on 127.0.0.1 with QEMU's user network, else 0.
    :ivar network: libvirt network, "" without one; :ivar filter: name of the network filter that protects the host
        and prevents forged addresses.
    """

    host: Host
    root: Path | None
    data: Path
    cloud_init: Path
    console: Path | None = None
    started: float = 0.0
    port: int = 0
    network: str = ""
    filter: str = ""


def build(spec: AgentSpec, start: Start) -> str:
    """Return the domain XML of an agent's machine, with a new UUID.

    :raises ValueError: an extra element is not allowed, or a text holds characters that XML cannot express.
    """
    app, options, host = spec.app, options_of(spec.app), start.host
    memory = memory_of(app)
    domain = etree.Element("domain", {"type": host.kind}, nsmap={"qemu": QEMU})
    _add(domain, "name", spec.backend_name)
    _add(domain, "uuid", uuid.uuid4())
    _add(domain, "metadata").append(label_element(_label(spec, start)))
    _add(domain, "memory", memory // 1024, unit="KiB")
    _add(domain, "currentMemory", min(options.balloon or memory, memory) // 1024, unit="KiB")
    _add(domain, "vcpu", vcpus_of(app))
    if host.cpu_limits and (app.limits.cpus is not None or options.cpu_shares is not None):
        tune = _add(domain, "cputune")
        if options.cpu_shares is not None:
            _add(tune, "shares", options.cpu_shares)
        if app.limits.cpus is not None:
            # For the whole machine including emulation, not for each virtual processor.
            _add(tune, "global_period", _PERIOD)
            _add(tune, "global_quota", max(_SMALLEST_QUOTA, math.ceil(app.limits.cpus * _PERIOD)))
    system = _add(domain, "os")
    if options.firmware == "efi":
        system.set("firmware", "efi")
    _add(system, "type", "hvm", arch=host.arch, machine=options.machine)
    if options.kernel:
        _add(system, "kernel", options.kernel)
        if options.initrd:
            _add(system, "initrd", options.initrd)
        if options.cmdline:
            _add(system, "cmdline", options.cmdline)
    else:
        _add(system, "boot", dev="hd")
    features = _add(domain, "features")
    _add(features, "acpi")
    if host.arch == "x86_64":
        _add(features, "apic")
    if host.bounded_cache:
        _add(_add(features, "tcg"), "tb-cache", _TRANSLATION_CACHE, unit="MiB")
    _cpu(domain, options.cpu, host)
    clock = _add(domain, "clock", offset="utc")
    _add(clock, "timer", name="rtc", tickpolicy="catchup")
    _add(domain, "on_poweroff", "destroy")
    _add(domain, "on_reboot", "restart")
    _add(domain, "on_crash", "destroy")
    _devices(domain, spec, start)
    if host.own_users and host.qemu:  # the provider sets the files' owner itself
        label = _add(domain, "seclabel", type="static", model="dac", relabel="no")
        _add(label, "label", f"+{spec.uid}:+{host.qemu[1]}")
    _add_extra(domain, options.xml)
    if options.endpoint == "tcp" and not start.network:
        _user_network(domain, spec, start.port)
    return etree.tostring(domain, encoding="unicode", pretty_print=True)


def _label(spec: AgentSpec, start: Start) -> Label:
    options = options_of(spec.app)
    handle = handle_of(spec, remote=start.console is None)
    return Label(
        installation=spec.installation,
        agent=spec.agent,
        spec=spec.hash,
        started=start.started,
        data=json.dumps(dict(handle.data), sort_keys=True),
        port=start.port,
        guest_port=options.port,
        network=start.network,
        announce=options.announce if start.port and start.console else "",
        guest_agent="yes" if options.guest_agent else "",
    )


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
            argument.set("value", _netdev(port, int(label.get("guest_port", "0"))))
    label.set("port", str(port))
    return etree.tostring(domain, encoding="unicode")


def vsock_cid(text: str) -> int:
    """Return the vsock context id in a running domain's XML, 0 without one."""
    cid = parse_xml(text).find("devices/vsock/cid")
    return 0 if cid is None else int(cid.get("address", "0"))


def _netdev(host_port: int, guest_port: int) -> str:
    """Return QEMU's description of a user network: only numbers are inserted, and nothing leads out."""
    forward = f"tcp:127.0.0.1:{host_port:d}-{GUEST_ADDRESS}:{guest_port:d}"
    return f"user,id=dispatcher0,restrict=on,ipv6=off,hostfwd={forward}"


def _add(parent: etree._Element, tag: str, text: object = None, **attributes: object) -> etree._Element:
    element = etree.SubElement(parent, tag, {key.rstrip("_"): str(value) for key, value in attributes.items()})
    if text is not None:
        element.text = str(text)
    return element


def _cpu(domain: etree._Element, model: str, host: Host) -> None:
    if model == "auto":
        model = "host-passthrough" if host.kind == "kvm" else "maximum"
    if model in {"host-passthrough", "host-model", "maximum"}:
        _add(domain, "cpu", mode=model)
    else:
        cpu = _add(domain, "cpu", mode="custom", match="exact", check="none")
        _add(cpu, "model", model, fallback="forbid")


def _devices(domain: etree._Element, spec: AgentSpec, start: Start) -> None:
    options = options_of(spec.app)
    devices = _add(domain, "devices")
    _add(devices, "controller", type="usb", model="none")
    _disks(devices, spec, start)
    serial = _add(devices, "serial", type="file" if start.console else "pty")
    if start.console:
        _add(serial, "source", path=start.console, append="on")
    _add(serial, "target", port=0)
    if options.guest_agent:
        channel = _add(devices, "channel", type="unix")
        _add(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    if options.endpoint == "vsock":
        vsock = _add(devices, "vsock", model="virtio")
        _add(vsock, "cid", auto="yes")
    elif start.network:
        _interface(devices, spec, start)
    balloon = _add(devices, "memballoon", model="virtio", autodeflate="on", freePageReporting="on")
    _add(balloon, "stats", period=10)
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")
    if start.host.arch == "x86_64":
        _add(devices, "panic", model="isa")


def _disks(devices: etree._Element, spec: AgentSpec, start: Start) -> None:
    options = options_of(spec.app)
    disks = [(start.data, "raw", DATA_SERIAL), (start.cloud_init, "raw", CLOUD_INIT_SERIAL)]
    if start.root is not None and options.image is not None:
        disks.insert(0, (start.root, "qcow2", ROOT_SERIAL))
    for letter, (path, form, serial) in zip("abc", disks, strict=False):
        disk = _add(devices, "disk", type="file", device="disk")
        driver = _add(disk, "driver", name="qemu", type=form)
        _add(disk, "source", file=path)
        if serial == ROOT_SERIAL:  # the base image is explicit, so that QEMU probes nothing
            backing = _add(disk, "backingStore", type="file")
            _add(backing, "format", type=options.format)
            source = _add(backing, "source", file=options.image)
            if (
                not start.host.own_users
            ):  # shared by all machines: libvirt must not change its owner to one of them
                _add(source, "seclabel", model="dac", relabel="no")
            _add(backing, "backingStore")
        _add(disk, "target", dev=f"vd{letter}", bus="virtio")
        if serial == CLOUD_INIT_SERIAL:
            _add(disk, "readonly")
        else:
            driver.set("discard", "unmap")
            if options.disk_bandwidth or options.disk_iops:
                tune = _add(disk, "iotune")
                if options.disk_bandwidth:
                    _add(tune, "total_bytes_sec", options.disk_bandwidth)
                if options.disk_iops:
                    _add(tune, "total_iops_sec", options.disk_iops)
        _add(disk, "serial", serial)


def _interface(devices: etree._Element, spec: AgentSpec, start: Start) -> None:
    """Add an interface on a libvirt network, isolated from the other guests there."""
    interface = _add(devices, "interface", type="network")
    _add(interface, "mac", address=mac_address(spec.backend_name))
    _add(interface, "source", network=start.network)
    _add(interface, "port", isolated="yes")
    _add(interface, "filterref", filter=start.filter)
    _add(interface, "model", type="virtio")
    if bandwidth := options_of(spec.app).network_bandwidth:
        element = _add(interface, "bandwidth")
        for direction in ("inbound", "outbound"):
            _add(element, direction, average=max(1, bandwidth // 1024))


def _user_network(domain: etree._Element, spec: AgentSpec, port: int) -> None:
    options = options_of(spec.app)
    bus = "pci.0" if options.machine.startswith("pc") and "q35" not in options.machine else "pcie.0"
    command = etree.SubElement(domain, f"{{{QEMU}}}commandline")
    # An explicit slot: libvirt numbers its own devices from 1 upwards and does not see this one.
    device = f"virtio-net-pci,netdev=dispatcher0,mac={mac_address(spec.backend_name)},bus={bus},addr=0x10"
    for argument in ("-netdev", _netdev(port, options.port), "-device", device):
        etree.SubElement(command, f"{{{QEMU}}}arg", {"value": argument})


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
