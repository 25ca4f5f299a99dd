"""The options in ``[providers.docker]`` and ``[apps.X.docker]``.

Each key that weakens an agent's isolation does one thing; `explain` names those that an app uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from dispatcher.plugin import Duration, IpNetworks, Size, Table, matching

Path_ = Annotated[Path, Field(strict=False)]
Url = Annotated[
    str,
    AfterValidator(
        matching(
            "|(unix:///|tcp://[^/]|https?://[^/]|ssh://[^/]).*", "unix:///PATH, tcp://HOST:PORT or ssh://USER@HOST"
        )
    ),
]
HostPath = Annotated[str, AfterValidator(matching(r"/[^\0]*", "an absolute path"))]
Image = Annotated[
    str,
    AfterValidator(matching("|[A-Za-z0-9][A-Za-z0-9_./:@-]*", "an image such as registry.example.org/name:tag")),
]
Inside = Annotated[
    str,
    AfterValidator(matching(r"|(?!.*/\.\.(/|$))(/[^/\0:]+)+", "an absolute path inside the container, not /")),
]
Tmpfs = Annotated[str, AfterValidator(matching("/[^:]+", "absolute paths inside the container"))]
OneCapability = Annotated[
    str, AfterValidator(matching("(?!ALL$)[A-Z][A-Z_]+", "names of single capabilities such as NET_BIND_SERVICE"))
]
Device = Annotated[
    str,
    AfterValidator(
        matching("/dev/[^:]+(:[^:]+(:[rwm]+)?)?", "devices such as /dev/fuse or /dev/ttyUSB0:/dev/tty:rw")
    ),
]
NamedNetwork = Annotated[
    str,
    AfterValidator(
        matching(
            "|(?!(host|none|bridge|default)$)[A-Za-z0-9][A-Za-z0-9_.-]*",
            "the name of a network of your own; the app's `network` chooses none, private or host",
        )
    ),
]
Signal = Annotated[str, AfterValidator(matching(r"|(SIG)?[A-Z0-9+]+", "a signal such as SIGINT"))]
#: Begins the names of all labels.
LABEL = "dispatcher."
#: What root needs to use the agent's data, and to give up its privileges.
ROOT_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID")


class Strict(Table):
    """A table whose values are not converted."""

    model_config = ConfigDict(strict=True)


class Registry(Strict):
    """``[providers.docker.registries."HOST"]``: credentials for a private registry."""

    username: str
    password_file: Path_ = Field(description="a file that only the manager reads")


class DockerOptions(Strict):
    """``[providers.docker]``"""

    url: Url = Field(
        default="",
        description="unix:///PATH, tcp://HOST:PORT or ssh://USER@HOST; default: $DOCKER_HOST or the usual socket",
    )
    tls_ca: Path_ | None = Field(default=None, description="certificate authority of a tcp:// engine")
    tls_cert: Path_ | None = Field(default=None, description="client certificate for a tcp:// engine")
    tls_key: Path_ | None = Field(default=None, description="private key of tls_cert")
    tls_verify: bool = Field(default=True, description="verify the engine's certificate")
    local: bool | None = Field(
        default=None, description="whether the engine runs on this host; by default only for unix://"
    )
    data: Literal["auto", "bind", "volume"] = Field(
        default="auto",
        description="bind: the core's directory; volume: a volume of the engine; auto: bind on a local engine",
    )
    publish: str = Field(
        default="127.0.0.1", description="address of the engine's host that ports are published on"
    )
    reach: str = Field(
        default="", description="address that the proxy uses for published ports; by default `publish`"
    )
    deny: IpNetworks = Field(
        default=[],
        description='networks that network = "private" cannot reach, besides this host and clouds\' metadata',
    )
    registries: dict[str, Registry] = Field(
        default={}, description="credentials by registry host, in addition to ~/.docker/config.json"
    )
    log_driver: Literal["local", "json-file"] = Field(default="local", description="the engine's log driver")
    log_max_size: Size = Field(default=10 * 1024**2, description="maximum size of a log file")
    log_max_files: int = Field(default=2, ge=1, le=100, description="log files per agent")
    usage_cache: Duration = Field(default=15.0, description="maximum age of statistics from a remote engine")

    @model_validator(mode="after")
    def _pairs(self) -> DockerOptions:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self


class Mount(Strict):
    """One more directory or file of the engine's host inside the container."""

    source: HostPath
    target: HostPath
    read_only: bool = True


class DockerAppOptions(Strict):
    """``[apps.X.docker]``: the program and its isolation."""

    image: Image = Field(default="", description="image: NAME[:TAG][@DIGEST]")
    build: Path_ | None = Field(default=None, description="directory with a Dockerfile, instead of an image")
    dockerfile: str = Field(default="Dockerfile", description="path of the Dockerfile, relative to `build`")
    build_args: dict[str, str] = Field(default={}, description="arguments of the build")
    pull: Literal["missing", "always", "never"] = Field(default="missing", description="when to pull the image")
    platform: str = Field(
        default="", description="platform of the image, such as linux/arm64; by default the engine's"
    )
    command: list[str] = Field(
        default=[], description="command, with {socket}, {port} and {data} replaced; by default the image's"
    )
    entrypoint: list[str] | None = Field(
        default=None, description="replaces the image's entry point; [] removes it"
    )
    port: int | None = Field(
        default=None, ge=1, le=65535, description="TCP port of the app; without it the app must listen on {socket}"
    )
    network: NamedNetwork = Field(
        default="", description='a named network of the engine, for apps with network = "private"'
    )
    data_path: Inside = Field(default="/data", description="path of the data in the container")
    workdir: Inside = Field(default="", description="working directory; by default data_path")
    init: bool = Field(default=True, description="run a small init that reaps orphans and forwards signals")
    stop_signal: Signal = Field(
        default="", description="signal that stops the app; by default the image's, usually SIGTERM"
    )
    hostname: str = Field(
        default="agent",
        pattern=r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?",
        description="host name in the container",
    )
    shm: Size | None = Field(default=None, description="size of /dev/shm; the engine's default is 64M")
    tmpfs: dict[Tmpfs, Size] = Field(
        default={"/tmp": 64 * 1024**2},  # noqa: S108
        description="writable directories in memory, with sizes",
    )
    ulimits: dict[str, int] = Field(default={}, description="soft and hard resource limits, such as nofile = 4096")
    # Keys that weaken isolation:
    user: Literal["agent", "root"] = Field(
        default="agent", description="root: with the capabilities that services need"
    )
    read_only: bool = Field(default=True, description="read-only root file system")
    changes_size: Size | None = Field(
        default=None, description="maximum size of the changes to the image's files; not every engine can limit it"
    )
    cap_add: list[OneCapability] = Field(
        default=[], description="capabilities to keep, such as NET_BIND_SERVICE; all others are dropped"
    )
    no_new_privileges: bool = Field(default=True, description="setuid programs gain no privileges")
    seccomp: str = Field(
        default="default", description="seccomp profile: default, engine (its own), unconfined, or a path"
    )
    apparmor: str = Field(default="", description="AppArmor profile; by default the engine's")
    devices: list[Device] = Field(default=[], description="devices of the host: /dev/X[:/dev/Y[:rwm]]")
    gpus: int | Literal["all"] | None = Field(default=None, description="number of GPUs, or all")
    mounts: list[Mount] = Field(
        default=[], description="additional files of the host, each with source, target and read_only"
    )

    @model_validator(mode="after")
    def _source(self) -> DockerAppOptions:
        if bool(self.image) == (self.build is not None):
            raise ValueError("either image or build is required")
        return self
