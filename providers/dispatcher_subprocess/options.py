"""The options in ``[providers.subprocess]`` and ``[apps.X.subprocess]``, and a command's placeholders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from dispatcher.plugin import (
    AbsolutePath,
    AgentSpec,
    App,
    ConfigError,
    IpNetworks,
    Limits,
    PortRange,
    Size,
    Table,
    Variable,
    check_environment,
    matching,
    slug,
)
from dispatcher.plugin import Argument as Text

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Of agents: the host's /usr is theirs too.
SHELL = "/bin/bash" if os.access("/bin/bash", os.X_OK) else "/bin/sh"
_PLACEHOLDER = re.compile(r"\{(socket|port|data)\}")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """Paths and port, as an agent sees them.

    :ivar tmp: directory for large temporary files, "" for the system's.
    """

    socket: str
    data: str
    port: int = 0
    tmp: str = ""

    def fill(self, text: str) -> str:
        """Return `text` with the placeholders replaced; any other use of braces stays as it is."""
        values = {"socket": self.socket, "port": str(self.port), "data": self.data}
        return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def endpoint_kind(app: App) -> str:
    """Return ``unix`` or ``tcp``, as the app uses {socket} or {port}.

    :raises ConfigError: not exactly one of them is in the command or the environment.
    """
    text = [*options_of(app).command, *app.environment.values()]
    found = {match for part in text for match in _PLACEHOLDER.findall(part)}
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


def environment(
    spec: AgentSpec, inside: Inside, manager: Mapping[str, str], secrets: str, limits: Limits
) -> dict[str, str]:
    """Return the whole environment of an agent; of the manager's it has the variables in `pass_environment` only.

    :param secrets: the directory of the secrets as seen from inside, "" when there are none.
    :param limits: those that are enforced.
    """
    name = slug(spec.user)
    variables = {
        "PATH": SEARCH_PATH,
        "LANG": "C.UTF-8",
        "HOME": inside.data,
        "USER": name,
        "LOGNAME": name,
        "SHELL": SHELL,
    }
    if inside.tmp:
        variables["TMPDIR"] = inside.tmp
    variables |= {name: manager[name] for name in options_of(spec.app).pass_environment if name in manager}
    variables |= {name: inside.fill(value) for name, value in spec.app.environment.items()}
    variables |= spec.variables(inside.data, secrets, limits=limits)
    check_environment(spec.app.name, variables)
    return variables
