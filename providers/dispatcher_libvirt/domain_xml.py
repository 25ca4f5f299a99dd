"""An agent's handle, and the domain XML of its machine, with a label in its metadata.  lxml quotes every value."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lxml import etree

from dispatcher.plugin import AgentSpec, App, Handle, ProviderError
from dispatcher_libvirt.host import Host
from dispatcher_libvirt.network import Interface
from dispatcher_libvirt.options import AppOptions, disk_of, memory_of, options_of, vcpus_of
from dispatcher_libvirt.xml_input import DEVICE_ELEMENTS, element, parse_extra, parse_xml

PROVIDER = "libvirt"
NAMESPACE = "urn:agent-dispatcher:libvirt:1"
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
PREFIX = "dispatcher"
#: The guest's addresses on QEMU's user network (QEMU's defaults); its DHCP server assigns the same.
GUEST_ADDRESS, GUEST_GATEWAY = "10.0.2.15", "10.0.2.2"
#: Serial numbers by which a guest finds its disks (/dev/disk/by-id/virtio-...; at most 20 characters).
ROOT_SERIAL, DATA_SERIAL, CLOUD_INIT_SERIAL = "dispatcher-root", "dispatcher-data", "dispatcher-seed"
# Without a limit an emulator caches up to a gibibyte of translated code: more than most guests have.  A smaller
# cache costs repeated translation.
_TRANSLATION_CACHE = 64  # MiB
# With these features a kernel copies and clears memory by string instructions, which QEMU emulates byte by byte.
_SLOW_EMULATED = ("erms", "fsrm")
_PERIOD = 100_000  # microseconds, of the processor quota
_SMALLEST_QUOTA = 1_000


def handle_of(spec: AgentSpec, *, remote: bool) -> Handle:
    """Return an agent's handle.

    :param remote: the machine runs on another host: there are no logs, and a tunnel ends at the agent's socket.
    """
    data: dict[str, Any] = {
        "uid": spec.uid,
        "gid": spec.gid,
        "disk": disk_of(spec.app),
        "flush": options_of(spec.app).flush,
    }
    data |= {"socket": str(spec.socket)} if remote else {"logs": str(spec.log_dir)}
    return Handle(provider=PROVIDER, agent=spec.agent, name=spec.backend_name, data=data)


def log_dir_of(handle: Handle) -> Path | None:
    """Return the log directory, None without one."""
    value = handle.data.get("logs")
    return Path(value) if isinstance(value, str) and value.startswith("/") else None


def disk_size_of(handle: Handle) -> int:
    """Return the configured size of the data disk in bytes, 0 where the handle does not contain it."""
    value = handle.data.get("disk")
    return value if isinstance(value, int) else 0


def user_of(handle: Handle) -> tuple[int, int]:
    """Return the host user and group of the agent.

    :raises ProviderError: the handle does not contain them.
    """
    uid, gid = handle.data.get("uid"), handle.data.get("gid")
    if not isinstance(uid, int) or not isinstance(gid, int):
        raise ProviderError(f"The handle of {handle.name} does not contain the user of its data")
    return uid, gid


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Metadata of a domain: enough to adopt the agent.

    :ivar port: forwarded port on 127.0.0.1, 0 without one; :ivar guest_port: the app's port in the guest.
    :ivar data: `Handle.data`; :ivar announce: console text that reports a working network, "" not to wait for it.
    :ivar guest_agent: the guest runs the QEMU guest agent.
    :ivar address: of the guest on a libvirt network, "" without one.
    """

    installation: str
    agent: str
    spec: str
    started: float
    data: dict[str, Any]
    port: int
    guest_port: int
    network: str
    announce: str
    guest_agent: bool
    address: str = ""

    def handle(self, name: str) -> Handle:
        """Return the handle of the agent.

        :param name: of the domain.
        """
        return Handle(provider=PROVIDER, agent=self.agent, name=name, data=self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The parameters of one start of a machine, besides the agent's specification.

    :ivar root, data, cloud_init: paths of the disks on QEMU's host.
    :ivar console: file for the serial console's output, None on another host.
    :ivar port: forwarded port on 127.0.0.1 with QEMU's user network, else 0.
    :ivar interface: on a libvirt network, None without one.
    """

    host: Host
    root: Path | None
    data: Path
    cloud_init: Path
    console: Path | None = None
    started: float = 0.0
    port: int = 0
    interface: Interface | None = None


def build(spec: AgentSpec, start: Start) -> str:
    """Return the domain XML of an agent's machine, with a new UUID.

    :raises ValueError: an extra element is not allowed, or a text holds characters that XML cannot express.
    """
    app, options, host = spec.app, options_of(spec.app), start.host
    memory = memory_of(app)
    x86 = host.arch == "x86_64"
    cache = element("tcg", element("tb-cache", _TRANSLATION_CACHE, unit="MiB")) if host.bounded_cache else None
    domain = element(
        "domain",
        element("name", spec.backend_name),
        element("uuid", uuid.uuid4()),
        element("metadata", label_element(_label(spec, start))),
        element("memory", memory // 1024, unit="KiB"),
        element("currentMemory", min(options.balloon or memory, memory) // 1024, unit="KiB"),
        element("vcpu", vcpus_of(app)),
        _cpu_limits(app, options, host),
        _system(options, host),
        element("features", element("acpi"), element("apic") if x86 else None, cache),
        _cpu(options.cpu, host),
        element("clock", element("timer", name="rtc", tickpolicy="catchup"), offset="utc"),
        element("on_poweroff", "destroy"),
        element("on_reboot", "restart"),
        element("on_crash", "destroy"),
        _devices(spec, start),
        type=host.kind,
    )
    if host.own_users and host.qemu:  # the provider sets the files' owner itself
        label = element("label", f"+{spec.uid}:+{host.qemu[1]}")
        domain.append(element("seclabel", label, type="static", model="dac", relabel="no"))
    _add_extra(domain, options.xml)
    if options.endpoint == "tcp" and start.interface is None:
        domain.append(_user_network(options, start.port))
    return etree.tostring(domain, encoding="unicode", pretty_print=True)


def _label(spec: AgentSpec, start: Start) -> Label:
    options = options_of(spec.app)
    handle = handle_of(spec, remote=start.console is None)
    return Label(
        installation=spec.installation,
        agent=spec.agent,
        spec=spec.hash,
        started=start.started,
        data=dict(handle.data),
        port=start.port,
        guest_port=options.port,
        network=start.interface.network if start.interface else "",
        address=str(start.interface.address.ip) if start.interface else "",
        announce=options.announce if start.port and start.console else "",
        guest_agent=options.guest_agent,
    )


def label_element(label: Label) -> etree._Element:
    """Return the metadata element of a domain."""
    made = etree.Element(f"{{{NAMESPACE}}}agent", nsmap={PREFIX: NAMESPACE})
    made.text = json.dumps(asdict(label))
    return made


def parse_label(text: str) -> Label:
    """Return the label in a metadata element.

    :raises ValueError: it is not a label, or damaged.
    """
    try:
        return Label(**json.loads(parse_xml(text).text or ""))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a damaged label: {error}") from error


def with_port(text: str, port: int) -> str:
    """Return the XML of a saved domain with another forwarded port.

    :raises ValueError: it is not a domain with a forwarded port.
    """
    domain = parse_xml(text)
    found = domain.find(f"metadata/{{{NAMESPACE}}}agent")
    label = None if found is None else parse_label(etree.tostring(found, encoding="unicode"))
    if found is None or label is None or not label.port:
        raise ValueError("not a domain with a forwarded port")
    for argument in domain.iter(f"{{{QEMU}}}arg"):
        if argument.get("value", "").startswith("user,"):
            argument.set("value", _netdev(port, label.guest_port))
    found.text = json.dumps(asdict(replace(label, port=port)))
    return etree.tostring(domain, encoding="unicode")


def vsock_cid(text: str) -> int:
    """Return the vsock context id in a running domain's XML, 0 without one."""
    cid = parse_xml(text).find("devices/vsock/cid")
    return 0 if cid is None else int(cid.get("address", "0"))


def _netdev(host_port: int, guest_port: int) -> str:
    """Return QEMU's description of a user network: only numbers are inserted, and nothing leads out."""
    forward = f"tcp:127.0.0.1:{host_port:d}-{GUEST_ADDRESS}:{guest_port:d}"
    return f"user,id=dispatcher0,restrict=on,ipv6=off,hostfwd={forward}"


def _cpu_limits(app: App, options: AppOptions, host: Host) -> etree._Element | None:
    tune = element("cputune")
    if options.cpu_shares is not None:
        tune.append(element("shares", options.cpu_shares))
    if app.limits.cpus is not None:
        # For the whole machine including emulation, not for each virtual processor.
        quota = max(_SMALLEST_QUOTA, math.ceil(app.limits.cpus * _PERIOD))
        tune.extend([element("global_period", _PERIOD), element("global_quota", quota)])
    return tune if host.cpu_limits and len(tune) else None


def _system(options: AppOptions, host: Host) -> etree._Element:
    system = element("os", element("type", "hvm", arch=host.arch, machine=options.machine))
    if options.firmware == "efi":
        system.set("firmware", "efi")
    if options.kernel:
        files = {"kernel": options.kernel, "initrd": options.initrd, "cmdline": options.cmdline}
        system.extend([element(name, value) for name, value in files.items() if value])
    else:
        system.append(element("boot", dev="hd"))
    return system


def _cpu(model: str, host: Host) -> etree._Element:
    if model == "auto" and host.kind != "kvm":
        slow = _SLOW_EMULATED if host.arch == "x86_64" else ()
        return element("cpu", *(element("feature", policy="disable", name=name) for name in slow), mode="maximum")
    if model == "auto":
        model = "host-passthrough"
    if model in {"host-passthrough", "host-model", "maximum"}:
        return element("cpu", mode=model)
    return element("cpu", element("model", model, fallback="forbid"), mode="custom", match="exact", check="none")


def _devices(spec: AgentSpec, start: Start) -> etree._Element:
    options = options_of(spec.app)
    source = element("source", path=start.console, append="on") if start.console else None
    channel = element("target", type="virtio", name="org.qemu.guest_agent.0")
    found = [
        element("controller", type="usb", model="none"),
        *_disks(options, start),
        element("serial", source, element("target", port=0), type="file" if start.console else "pty"),
        element("channel", channel, type="unix") if options.guest_agent else None,
        element("vsock", element("cid", auto="yes"), model="virtio") if options.endpoint == "vsock" else None,
        _interface(options, start.interface) if start.interface else None,
        element(
            "memballoon", element("stats", period=10), model="virtio", autodeflate="on", freePageReporting="on"
        ),
        element("rng", element("backend", "/dev/urandom", model="random"), model="virtio"),
        element("panic", model="isa") if start.host.arch == "x86_64" else None,
    ]
    return element("devices", *found)


def _disks(options: AppOptions, start: Start) -> Iterator[etree._Element]:
    disks = [(start.data, "raw", DATA_SERIAL), (start.cloud_init, "raw", CLOUD_INIT_SERIAL)]
    if start.root is not None and options.image is not None:
        disks.insert(0, (start.root, "qcow2", ROOT_SERIAL))
    limits = {"total_bytes_sec": options.disk_bandwidth, "total_iops_sec": options.disk_iops}
    for letter, (path, form, serial) in zip("abc", disks, strict=False):
        driver = element("driver", name="qemu", type=form)
        disk = element("disk", driver, element("source", file=path), type="file", device="disk")
        if serial == ROOT_SERIAL:  # the base image is explicit, so that QEMU probes nothing
            # The base is shared by all machines: libvirt must not change its owner to one of them.
            label = None if start.host.own_users else element("seclabel", model="dac", relabel="no")
            base = element("source", label, file=options.image)
            nothing_below = element("backingStore")
            disk.append(
                element("backingStore", element("format", type=options.format), base, nothing_below, type="file")
            )
        disk.append(element("target", dev=f"vd{letter}", bus="virtio"))
        if serial == CLOUD_INIT_SERIAL:
            disk.append(element("readonly"))
        else:
            driver.set("discard", "unmap")
            tune = [element(name, value) for name, value in limits.items() if value]
            disk.extend([element("iotune", *tune)] if tune else [])
        disk.append(element("serial", serial))
        yield disk


def _interface(options: AppOptions, interface: Interface) -> etree._Element:
    """Return an interface on a libvirt network, isolated from the other guests there, with one address."""
    bandwidth = options.network_bandwidth or 0
    rates = [element(way, average=max(1, bandwidth // 1024)) for way in ("inbound", "outbound")]
    return element(
        "interface",
        element("mac", address=interface.mac),
        element("source", network=interface.network),
        element("port", isolated="yes"),
        element("filterref", element("parameter", name="IP", value=interface.address.ip), filter=interface.filter),
        element("model", type="virtio"),
        element("bandwidth", *rates) if bandwidth else None,
        type="network",
    )


def _user_network(options: AppOptions, port: int) -> etree._Element:
    bus = "pci.0" if options.machine.startswith("pc") and "q35" not in options.machine else "pcie.0"
    # An explicit slot: libvirt numbers its own devices from 1 upwards and does not see this one.
    device = f"virtio-net-pci,netdev=dispatcher0,bus={bus},addr=0x10"
    command = etree.Element(f"{{{QEMU}}}commandline", nsmap={"qemu": QEMU})
    for argument in ("-netdev", _netdev(port, options.port), "-device", device):
        etree.SubElement(command, f"{{{QEMU}}}arg", {"value": argument})
    return command


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
