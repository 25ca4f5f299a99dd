"""Options in ``[providers.libvirt]`` and ``[apps.X.libvirt]``, and values derived from an app."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from dispatcher.plugin import (
    AbsolutePath,
    AgentSpec,
    App,
    ConfigError,
    Duration,
    Network,
    PortRange,
    Size,
    Table,
    check_environment,
    matching,
)
from dispatcher.plugin import Argument as Text
from dispatcher_libvirt.xml_input import parse_extra

MIB = 1024**2
SMALLEST_MEMORY = 64 * MIB
SMALLEST_DISK = 16 * MIB
MAX_TEXT = 64 * 1024  # bytes of command and environment together: one exec in the guest takes them


Word = Annotated[
    str, AfterValidator(matching(r"([A-Za-z0-9][A-Za-z0-9._+-]{0,63})?", "a name of letters, digits and . _ + -"))
]
Directory = Annotated[
    str,
    AfterValidator(matching(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", "an absolute path of letters, digits and . _ -")),
]
Argument = Annotated[Text, Field(max_length=MAX_TEXT)]


class Options(Table):
    """``[providers.libvirt]``"""

    uri: str = Field(
        default="", description="connection URI; by default qemu:///system for root, qemu:///session for others"
    )
    accelerator: Literal["auto", "kvm", "emulation"] = Field(
        default="auto", description="KVM where it works, KVM or an error, or always emulation"
    )
    network: Word = Field(default="", description='libvirt network of apps with network = "private"')
    storage: AbsolutePath | None = Field(
        default=None, description="directory of machines' disks; by default in manager.state_dir"
    )
    pool: Word = Field(default="", description="storage pool for machines' disks on a remote host")
    own_users: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="run QEMU as the agent's own host user: where possible, always (or an error), or never",
    )
    ports: PortRange = Field(default=(18000, 19999), description="first and last port on 127.0.0.1")
    connections: int = Field(default=4, ge=1, le=32, description="maximum concurrent starts, saves and stops")
    keepalive: Duration = Field(default=5.0, ge=1, le=600, description="interval of keep-alive messages")

    @field_validator("uri")
    @classmethod
    def _uri(cls, value: str) -> str:
        if not value:
            return value
        parts = urlsplit(value)
        if parts.scheme.partition("+")[0] not in {"qemu", "test"} or not value.isprintable() or " " in value:
            raise ValueError("a URI of libvirt's QEMU driver, such as qemu:///system or qemu+ssh://HOST/system")
        parse_qs(parts.query, strict_parsing=bool(parts.query))
        return value

    @model_validator(mode="after")
    def _remote(self) -> Options:
        parts = urlsplit(self.uri)
        if parts.hostname and not self.pool:
            raise ValueError("a remote uri needs pool, for machines' disks")
        if parts.hostname and parts.scheme != "qemu+ssh":
            raise ValueError("a remote uri begins with qemu+ssh://: agents are reached through ssh too")
        return self


class AppOptions(Table):
    """``[apps.X.libvirt]``"""

    image: AbsolutePath | None = Field(default=None, description="base image; each agent has an overlay of it")
    format: Literal["qcow2", "raw"] = Field(default="qcow2", description="format of the base image")
    kernel: AbsolutePath | None = Field(default=None, description="kernel for direct boot")
    initrd: AbsolutePath | None = Field(default=None, description="initial RAM disk for direct boot")
    cmdline: Argument = Field(default="console=ttyS0 quiet panic=-1", description="the kernel's command line")
    firmware: Literal["bios", "efi"] = Field(
        default="bios", description="firmware that starts the image's boot loader"
    )
    command: list[Argument] = Field(
        default=[], description="program and arguments in the guest; {port} and {data} are replaced"
    )
    port: int = Field(default=8080, ge=1, le=65535, description="port of the app in the guest")
    announce: Argument = Field(
        default="dispatcher: starting the app",
        description="console text that reports a working network in the guest; earlier connections are lost",
    )
    endpoint: Literal["tcp", "vsock"] = Field(default="tcp", description="transport to the port")
    data: Directory = Field(default="/data", description="mount point of the data disk in the guest")
    data_size: Size = Field(
        default=1024 * MIB, ge=SMALLEST_DISK, description="size of the data disk if the app has no `disk` limit"
    )
    data_allocation: Literal["sparse", "full"] = Field(
        default="sparse", description="allocate the data disk's space on use, or all at once"
    )
    root: Literal["keep", "fresh"] = Field(
        default="keep", description="keep the overlay over a restart, or begin with a fresh one"
    )
    snapshots: int = Field(
        default=1,
        ge=0,
        le=20,
        description="snapshots of the data disk and overlays to keep from before changes of the image",
    )
    default_memory: Size = Field(
        default=512 * MIB, ge=SMALLEST_MEMORY, description="memory of the guest if the app has no `memory` limit"
    )
    balloon: Size | None = Field(
        default=None, ge=SMALLEST_MEMORY, description="initial memory of the guest, below its limit"
    )
    vcpus: int | None = Field(
        default=None, ge=1, le=512, description="virtual CPUs; by default `cpus`, rounded up"
    )
    cpu: Word = Field(default="auto", description="CPU: auto, host-passthrough, host-model, maximum, or a model")
    cpu_shares: int | None = Field(
        default=None, ge=2, le=262144, description="CPU weight relative to other machines"
    )
    disk_bandwidth: Size | None = Field(
        default=None, description="maximum bytes per second of each disk, reading and writing"
    )
    disk_iops: int | None = Field(default=None, ge=1, description="maximum operations per second of each disk")
    network_bandwidth: Size | None = Field(
        default=None, ge=1024, description="maximum bytes per second each way, on a libvirt network"
    )
    machine: Word = Field(default="q35", description="QEMU's machine type")
    user_data: AbsolutePath | None = Field(default=None, description="file with cloud-init user data")
    guest_agent: bool = Field(default=False, description="whether the image runs the QEMU guest agent")
    flush: Duration = Field(
        default=5.0, le=300, description="time for the guest to write its disks, between the grace time and force"
    )
    xml: list[Argument] = Field(default=[], description="further elements of libvirt's domain XML")

    @field_validator("command")
    @classmethod
    def _command(cls, value: list[str]) -> list[str]:
        if value and not value[0].startswith("/"):
            raise ValueError("the program's absolute path first")
        return value

    @field_validator("xml")
    @classmethod
    def _xml(cls, value: list[str]) -> list[str]:
        for text in value:
            parse_extra(text)
        return value

    @model_validator(mode="after")
    def _boots(self) -> AppOptions:
        if not (self.image or self.kernel):
            raise ValueError("image, or kernel and initrd, is required")
        if self.initrd and not self.kernel:
            raise ValueError("initrd needs kernel")
        return self


def options_of(app: App) -> AppOptions:
    """Return an app's own options."""
    assert isinstance(app.options, AppOptions)
    return app.options


def memory_of(app: App) -> int:
    """Return the memory of an app's machines in bytes.

    :raises ConfigError: it is too small for any system.
    """
    memory = int(app.limits.demanded("memory") or options_of(app).default_memory)
    return _at_least(SMALLEST_MEMORY, memory, app, "memory", "machine")


def disk_of(app: App) -> int:
    """Return the size of an app's data disks in bytes, in whole MiB.

    :raises ConfigError: it is too small for a file system.
    """
    size = _at_least(SMALLEST_DISK, app.limits.disk or options_of(app).data_size, app, "disk", "data disk")
    return -(-size // MIB) * MIB


def _at_least(smallest: int, size: int, app: App, key: str, what: str) -> int:
    if size < smallest:
        raise ConfigError(
            f"apps.{app.name}.{key}: {size} bytes are too little for a {what}",
            fix=f"give it at least {smallest // MIB}M",
        )
    return size


def vcpus_of(app: App) -> int:
    """Return the number of virtual processors of an app's machines."""
    return options_of(app).vcpus or max(1, math.ceil(app.limits.cpus or 1))


def fill(text: str, options: AppOptions) -> str:
    """Return `text` with ``{port}`` and ``{data}`` replaced; other braces stay."""
    return text.replace("{port}", str(options.port)).replace("{data}", options.data)


def environment(spec: AgentSpec, secrets: str) -> dict[str, str]:
    """Return the environment of an agent's app, without the guest's PATH.

    :param secrets: the directory of the secrets in the guest.
    :raises ConfigError: a name or value is invalid.
    """
    options = options_of(spec.app)
    variables = {"HOME": options.data}
    variables |= {name: fill(value, options) for name, value in spec.app.environment.items()}
    enforced = replace(spec.app.limits, memory=memory_of(spec.app), pids=None)
    variables |= spec.variables(options.data, secrets, limits=enforced)
    check_environment(spec.app.name, variables)
    size = sum(len(name) + len(value.encode()) + 2 for name, value in variables.items())
    if size + sum(len(word.encode()) + 1 for word in options.command) > MAX_TEXT:
        raise ConfigError(
            f"apps.{spec.app.name}: command and environment are over {MAX_TEXT} bytes", fix="shorten them"
        )
    return variables


def unsupported_network(app: App, options: Options) -> str:
    """Return why an app's network is not available, or ""."""
    if app.network is Network.HOST:
        return "a machine cannot use the host's network"
    if app.network is Network.PRIVATE and not options.network:
        return "providers.libvirt.network is not set"
    return ""
