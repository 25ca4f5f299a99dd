"""The options in ``[providers.subprocess]`` and ``[apps.X.subprocess]``, and a command's placeholders."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from dispatcher.plugin import (
    AbsolutePath,
    App,
    ConfigError,
    Inside,
    IpNetworks,
    PortRange,
    Size,
    Table,
    Variable,
    matching,
)
from dispatcher.plugin import Argument as Text

#: Of agents: the host's /usr is theirs too.
SHELL = "/bin/bash" if os.access("/bin/bash", os.X_OK) else "/bin/sh"


Argument = Annotated[Text, Field(max_length=131071)]  # bytes, execve(2)
Workdir = Annotated[
    str,
    AfterValidator(matching(r"(/|\{data\})[^\0]*", "an absolute path, or one that begins with {data}")),
]
Umask = Annotated[str, AfterValidator(matching("0?[0-7]{3}", 'three octal digits such as "007"'))]


class Options(Table):
    """``[providers.subprocess]``"""

    bubblewrap: Literal["auto", "always", "never"] = Field(
        default="auto", description="use bubblewrap: if it works, always, or never"
    )
    cgroups: Literal["auto", "never"] = Field(
        default="auto", description="use control groups for limits, usage, suspending and killing, if they work"
    )
    log_size: Size = Field(default=1024 * 1024, ge=4096, description="size at which a log file is rotated")
    log_files: int = Field(
        default=4, ge=1, le=100, description="log files kept per agent, the current one included"
    )
    ports: PortRange = Field(default=(20000, 29999), description="first and last TCP port for {port}")
    private_network: Literal["auto", "pasta", "slirp4netns"] = Field(
        default="auto", description='program for the traffic of network = "private"'
    )
    deny: IpNetworks = Field(
        default=[],
        description='networks that network = "private" cannot reach, besides this host and clouds\' metadata',
    )


class AppOptions(Table):
    """``[apps.X.subprocess]``"""

    command: list[Argument] = Field(
        min_length=1,
        description="program and arguments, no shell; {socket}, {port} and {data} are replaced",
    )
    workdir: Workdir = Field(default="{data}", description="working directory in the sandbox")
    read_only: list[AbsolutePath] = Field(default=[], description="additional paths of the host, read-only")
    writable: list[AbsolutePath] = Field(
        default=[], description="additional paths of the host, writable if their modes allow it"
    )
    hide: list[AbsolutePath] = Field(default=[], description="paths below visible ones to hide")
    pass_environment: list[Variable] = Field(
        default=[], description="variables of the manager's environment to pass to the app"
    )
    devices: list[AbsolutePath] = Field(default=[], description="additional devices, such as /dev/dri")
    seccomp: bool = Field(
        default=True,
        description="refuse system calls that apps seldom use: keys, BPF, namespaces, mounts, io_uring, libaio, "
        "socket filters",
    )
    umask: Umask = Field(
        default="007", description="three octal digits; the proxy's group needs write access to the socket"
    )
    tmp_size: Size = Field(default=256 * 1024**2, description="size of /tmp and of /dev/shm, in memory")
    nofile: int = Field(default=8192, ge=16, le=1048576, description="maximum open files per process")
    file_size: Size | None = Field(default=None, description="maximum size of a file")
    nice: int = Field(default=0, ge=0, le=19, description="nice value: a higher one means lower priority")

    @field_validator("command")
    @classmethod
    def _command(cls, value: list[str]) -> list[str]:
        if not value[0].strip() or value[0].startswith("-"):
            raise ValueError("the program first")
        return value


def options_of(app: App) -> AppOptions:
    """Return an app's options with their type."""
    assert isinstance(app.options, AppOptions)
    return app.options


def endpoint_kind(app: App) -> str:
    """Return ``unix`` or ``tcp``, as the app uses {socket} or {port}.

    :raises ConfigError: not exactly one of them is in the command or the environment.
    """
    found = Inside.placeholders(*options_of(app).command, *app.environment.values())
    if {"socket", "port"} <= found:
        raise ConfigError(
            f"apps.{app.name}.subprocess.command: {{socket}} and {{port}} exclude each other",
            why="an app listens at one address, and both are in the command or the environment",
            fix="remove {port}; or remove {socket} if the app cannot listen on a Unix socket",
        )
    if "socket" in found:
        return "unix"
    if "port" in found:
        return "tcp"
    raise ConfigError(
        f"apps.{app.name}.subprocess.command: the app does not get an address to listen on",
        why="neither {socket} nor {port} is in the command or the environment",
        fix="put {socket} (better, as other users cannot connect) or {port} where the app takes its address",
    )
