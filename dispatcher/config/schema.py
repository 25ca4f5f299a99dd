"""The tables of the configuration file: keys, types, defaults and descriptions.

docs/reference/configuration.md is generated from them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator

from dispatcher.config import default_paths
from dispatcher.plugin.model import Limits, Network
from dispatcher.plugin.options import (
    Addresses,
    Count,
    Duration,
    Environment,
    Flag,
    MaybeCount,
    MaybeDuration,
    MaybeNumber,
    MaybeSize,
    NetworkAddresses,
    Origin,
    Size,
    Table,
    UidRange,
    UrlPath,
    Variable,
    absolute_path,
    variable,
)

PIDS = 4096  # processes and threads of an agent, by default
MEMORY_SHARE = 4  # an agent has this part of the host's memory, by default
SMALLEST_MEMORY = 8 << 20  # bytes: with less, not even a sandbox starts
LEAST_MEMORY = 1 << 30  # bytes: the default on a small host, if that is at most half of its memory
ENVIRONMENT = "env:"  # begins the name of a variable, where a secret may come from a file or a variable


def secret_source(value: str) -> str:
    """Return where a secret comes from: the absolute path of a file, or ``env:VARIABLE``.

    :raises ValueError: neither of these.
    """
    try:
        if value.startswith(ENVIRONMENT):
            variable(value.removeprefix(ENVIRONMENT))
        else:
            absolute_path(Path(value))
    except ValueError as error:
        raise ValueError('the absolute path of a file, or "env:VARIABLE"') from error
    return value


def unprivileged(user: str) -> str:
    """Return the name of the proxy's user, which must not be root.

    :raises ValueError: it is root, by name or number.
    """
    if user in {"root", "0"}:
        raise ValueError("a user without privileges; the proxy faces the web")
    return user


Secrets = dict[Variable, Annotated[str, AfterValidator(secret_source)]]


class ManagerConfig(Table):
    """``[manager]``"""

    listen: Addresses = Field(
        default=[], description="TCP addresses for administration over TLS, such as 0.0.0.0:4443"
    )
    state_dir: Path = Field(
        default_factory=default_paths.state_dir, description="directory of the database, agents' data and logs"
    )
    run_dir: Path = Field(
        default_factory=default_paths.run_dir,
        description="directory of sockets; keep it short: the path of a socket has at most 107 bytes",
    )
    database: str = Field(
        default="",
        description="`sqlite:///PATH` or `postgresql+psycopg://...`; by default a file in state_dir",
    )
    tls_cert: Path | None = Field(default=None, description="certificate for listen; by default self-signed")
    tls_key: Path | None = Field(default=None, description="private key of tls_cert")
    client_ca: Path | None = Field(
        default=None, description="CA whose client certificates give administrative access over TLS"
    )
    token_file: Path | None = Field(
        default=None,
        description="file of tokens for full administrative access over TLS, one a line; API tokens need no file",
    )
    admin_group: str = Field(
        default="dispatcher-admin", description="group with administrative access through manager.sock"
    )
    proxy_group: str = Field(
        default="dispatcher-proxy", description="group with access to proxy.sock and to agents' sockets"
    )

    @field_validator("proxy_group")
    @classmethod
    def _not_administrators(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("admin_group"):
            raise ValueError("another group than admin_group; the proxy may not administer")
        return value

    uid_range: UidRange = Field(
        default=(1900000000, 1900065535),
        description="first and last host user id for agents, when started as root; no id of an account, of "
        "/etc/subuid or of /etc/subgid is given to an agent",
    )
    threads: Count = Field(default=48, ge=2, le=256, description="maximum threads of the REST API")
    provider_threads: Count = Field(default=32, ge=1, le=512, description="maximum threads of each provider")
    reconcile_interval: Duration = Field(
        default=30.0, description="interval at which actual and desired states are compared"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="minimum level of log messages (written to standard error)"
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="text, or one JSON object a line"
    )


class ProxyConfig(Table):
    """``[proxy]``"""

    listen: Addresses = Field(
        default=["127.0.0.1:8080"],
        description="HOST:PORT, [IPv6]:PORT, unix:/PATH, or systemd (socket activation)",
    )
    tls_cert: Path | None = Field(default=None, description="PEM file with the certificate chain; enables HTTPS")
    tls_key: Path | None = Field(default=None, description="private key of tls_cert")
    redirect_listen: Addresses = Field(default=[], description="HTTP addresses that redirect to HTTPS")
    hsts: MaybeDuration = Field(
        default=False, description="max-age of Strict-Transport-Security; false: no such header"
    )
    workers: Count = Field(
        default=1, ge=1, le=256, description="worker processes; one for each CPU core at most makes sense"
    )
    user: Annotated[str, AfterValidator(unprivileged)] = Field(
        default="dispatcher-proxy", description="user of the proxy when started as root"
    )
    routing: Literal["session", "subdomain"] = Field(
        default="session",
        description="one host for all agents, or a subdomain (a separate origin) for each: AGENT.DOMAIN",
    )
    prefix: str = Field(default="/auth", description="URL path of the portal")
    public_url: Origin = Field(default="", description="URL in the browser, such as https://apps.example.org")
    trusted_proxies: NetworkAddresses = Field(
        default=[], description="networks of front proxies whose X-Forwarded-* header fields are trusted"
    )
    proxy_protocol: Flag = Field(default=False, description="require PROXY protocol v2 on every connection")
    feed_grace: Duration = Field(
        default=600.0, description="how long running agents are served while the manager is unreachable"
    )
    hold: Duration = Field(default=5.0, description="how long a request waits for an agent that resumes")
    access_log: str = Field(default="", description="path of a file, or - for standard output; empty: none")
    metrics_by_agent: Flag = Field(default=False, description="label requests with the agent in place of the app")
    head_bytes: Size = Field(default=65536, description="maximum size of the request line and header fields")
    head_fields: Count = Field(default=100, ge=10, description="maximum number of header fields of a request")
    head_timeout: Duration = Field(
        default=15.0, description="maximum time to receive the request line and header fields"
    )
    idle_timeout: Duration = Field(default=75.0, description="maximum idle time of a kept-alive connection")
    body_timeout: Duration = Field(default=60.0, description="maximum pause of a client within a request body")
    upstream_timeout: Duration = Field(
        default=600.0,
        description="maximum time until an agent's response begins, or until it reads more of a request",
    )
    connections: Count = Field(default=20000, ge=16, description="maximum connections of a worker")
    connections_per_address: Count = Field(
        default=2000,
        ge=1,
        description="maximum connections of a worker from one IPv4 address or IPv6 /64; not for loopback and "
        "trusted proxies",
    )
    in_flight_per_agent: Count = Field(
        default=1000, ge=1, description="maximum concurrent requests of a worker to one agent"
    )
    drain_timeout: Duration = Field(
        default=30.0, description="how long requests in progress may take when the proxy stops"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="minimum level of log messages (written to standard error)"
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="text, or one JSON object a line"
    )

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value) or "/." in value:
            raise ValueError("a path such as /auth, without a slash at the end")
        return value


def authenticators(value: str | list[str]) -> str | list[str]:
    """Return the value of ``auth.authenticator``.

    :raises ValueError: an empty list, an entry that is there twice, or no name.
    """
    entries = [value] if isinstance(value, str) else value
    if not entries or len(set(entries)) < len(entries):
        raise ValueError("at least one name, and each once")
    for entry in entries:
        if not re.fullmatch(r"[^.]{1,64}(\.[a-z0-9][a-z0-9-]{0,31})?", entry):
            raise ValueError("names of plugins, or PLUGIN.NAME where NAME has lower-case letters, digits and -")
    return value


Authenticators = Annotated[str | list[str], AfterValidator(authenticators)]


class AuthConfig(Table):
    """``[auth]``; its tables belong to the authenticators of that name."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    authenticator: Authenticators = Field(
        default="local",
        description="how users sign in: local, the name of a plugin, or a list of several, asked in this order",
    )
    session_lifetime: Duration = Field(default=7 * 86400.0, description="maximum lifetime of a session")
    session_idle: Duration = Field(default=86400.0, description="maximum time of a session without a request")
    hash_workers: Count = Field(
        default=2, ge=1, le=64, description="maximum concurrent password checks; a plugin runs queued ones, too"
    )
    hash_queue: Count = Field(
        default=64, ge=1, description="maximum queued password checks; further sign-ins get 429"
    )

    sync_interval: MaybeDuration = Field(
        default=3600.0,
        description="interval at which groups are read from directories, and users who have left are found; "
        "false: never",
    )
    keep_departed: MaybeDuration = Field(
        default=False,
        description="time after which the agents and data of users who have left the directory are deleted; "
        "false: never",
    )

    @property
    def authenticators(self) -> tuple[str, ...]:
        """The authenticators: names of plugins, or ``PLUGIN.NAME``."""
        return (self.authenticator,) if isinstance(self.authenticator, str) else tuple(self.authenticator)


class AppDefaults(Table):
    """``[defaults]``: values for every app, which an app can override."""

    provider: str = Field(default="subprocess", description="name of the provider that isolates the agents")
    memory: MaybeSize | None = Field(
        default=None,
        description="maximum memory of an agent; by default a quarter of the host's, or of what the manager's "
        "control group may use; false: unlimited",
    )
    swap: MaybeSize | None = Field(
        default=None,
        description="maximum swap space, in addition to memory; by default none, where memory is limited; "
        "false: unlimited",
    )
    cpus: MaybeNumber = Field(default=False, description="maximum CPU cores; 0.5 is half a core; false: unlimited")
    pids: MaybeCount | None = Field(
        default=None, description="maximum number of processes and threads; by default 4096; false: unlimited"
    )
    disk: MaybeSize = Field(default=False, description="maximum size of the data; false: unlimited")
    network: Network = Field(
        default=Network.NONE,
        description="access to no network, to other hosts only, or to everything that this host reaches",
    )
    environment: Environment = Field(
        default={}, description="environment variables; those of an app are added to the defaults"
    )
    health: UrlPath = Field(
        default="/", description="URL path that returns a status below 500 when the app is ready"
    )
    prepare_timeout: Duration = Field(default=3600.0, description="maximum time to pull or build an image")
    start_timeout: Duration = Field(default=60.0, description="maximum time from start to ready")
    stop_grace: Duration = Field(default=10.0, description="time between the request to stop and the forced stop")
    idle_timeout: MaybeDuration = Field(
        default=1800.0, description="time without use until `idle_action`; false: never"
    )
    idle_action: Literal["suspend", "hibernate", "stop"] = Field(
        default="suspend", description="action on an idle agent; `stop` where the provider does not support it"
    )
    idle_stop: MaybeDuration = Field(
        default=False, description="time until a suspended agent is stopped; false: never"
    )
    busy_grace: MaybeDuration = Field(
        default=False, description="maximum time that CPU use keeps an idle agent running"
    )
    max_restarts: Count = Field(
        default=5, ge=0, description="maximum restarts within ten minutes; after more the agent has failed"
    )
    identity: Flag = Field(
        default=False,
        description="add X-Dispatcher-Identity to the app's requests: a signed statement (JWT) of user and groups",
    )
    credentials: Literal["none", "stdin"] = Field(
        default="none",
        description="stdin: the app receives the name and password of the sign-in on its standard input",
    )

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: float | None) -> float | None:
        if value is not None and value is not False and value < SMALLEST_MEMORY:
            raise ValueError(f'at least "{SMALLEST_MEMORY >> 20}M" (a sandbox needs some itself), or false')
        return value

    def limits(self) -> Limits:
        """Return the limits of an agent, with the core's own where the configuration sets none."""
        own: dict[str, int] = {"pids": PIDS, "memory": default_memory()}
        if self.memory is not False:
            own["swap"] = 0
        values = {name: getattr(self, name) for name in ("memory", "swap", "cpus", "pids", "disk")}
        unset = frozenset(name for name in own if values[name] is None)
        values |= {name: own[name] for name in unset}
        return Limits(
            **{name: None if value is False else value for name, value in values.items()}, defaults=unset
        )


def default_memory(root: Path = Path("/")) -> int:
    """Return the default limit of memory in bytes, for this host, container or service.

    :param root: of the file system.
    """
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = min([host, *_own_limits(root)])
    return max(available // MEMORY_SHARE, min(LEAST_MEMORY, available // 2))


def _own_limits(root: Path) -> Iterator[int]:
    """Yield the limits of memory of the control groups that this process is in (cgroups(7)): 2 or 1."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        else:
            continue
        own = PurePath(path.strip("/"))
        for group in (own, *own.parents):
            yield from (int(text) for text in _lines(top / group / name) if text.isdigit())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


class AppConfig(AppDefaults):
    """``[apps.NAME]``; its other tables belong to the providers of that name."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    title: str = Field(default="", description="title in the portal; by default the name")
    secrets: Secrets = Field(
        default={},
        description='`NAME = "/path/of/file"` or `NAME = "env:VARIABLE"`: read by the manager when an agent '
        "starts, and given to the app as the file `$DISPATCHER_SECRETS/NAME`",
    )

    def provider_table(self, provider: str) -> dict[str, Any]:
        """Return ``[apps.NAME.PROVIDER]``, not validated."""
        return dict((self.model_extra or {}).get(provider, {}))
