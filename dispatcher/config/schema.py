"""The tables of the configuration file: what may be set, its type, default and meaning.  Pure.

The reference (docs/reference/configuration.md) is made from these descriptions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator

from dispatcher.config import defaults
from dispatcher.plugin.model import Network
from dispatcher.plugin.options import (
    Addresses,
    Count,
    Duration,
    Environment,
    Flag,
    MaybeDuration,
    NetworkAddresses,
    Number,
    Origin,
    Size,
    Table,
    UidRange,
    UrlPath,
    Variable,
    absolute_path,
    variable,
)

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


Secrets = dict[Variable, Annotated[str, AfterValidator(secret_source)]]


class ManagerConfig(Table):
    """``[manager]``"""

    listen: Addresses = Field(
        default=[], description="TCP addresses with TLS, such as 0.0.0.0:4443; none by default"
    )
    state_dir: Path = Field(default_factory=defaults.state_dir, description="database, agents' data, logs")
    run_dir: Path = Field(
        default_factory=defaults.run_dir, description="sockets; short, as a path has under 108 bytes"
    )
    database: str = Field(default="", description="SQLAlchemy URL; by default SQLite in state_dir")
    tls_cert: Path | None = Field(default=None, description="for listen; self-signed on demand when absent")
    tls_key: Path | None = Field(default=None, description="the key of tls_cert")
    client_ca: Path | None = Field(default=None, description="certificates signed by it may administer over TLS")
    token_file: Path | None = Field(default=None, description="tokens that may administer over TLS, one a line")
    admin_group: str = Field(default="dispatcher-admin", description="group that may use manager.sock")
    proxy_group: str = Field(
        default="dispatcher-proxy", description="group that may use proxy.sock and reach agents"
    )
    uid_range: UidRange = Field(default=(200000, 265535), description="host user ids for agents, as root")
    threads: Count = Field(default=48, ge=2, le=256, description="threads of the REST API")
    provider_threads: Count = Field(default=32, ge=1, le=512, description="threads per provider")
    reconcile_interval: Duration = Field(
        default=30.0, description="how often everything is compared with what should be"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is logged, to standard error"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="for people or for programs")


class ProxyConfig(Table):
    """``[proxy]``"""

    listen: Addresses = Field(
        default=["127.0.0.1:8080"],
        description="HOST:PORT, [IPv6]:PORT, unix:/PATH, or systemd (socket activation)",
    )
    tls_cert: Path | None = Field(default=None, description="PEM file, the chain included; HTTPS when set")
    tls_key: Path | None = Field(default=None, description="the key of tls_cert")
    redirect_listen: Addresses = Field(default=[], description="plain HTTP addresses that redirect to HTTPS")
    hsts: MaybeDuration = Field(default=False, description="max-age of Strict-Transport-Security, with TLS")
    workers: Count = Field(default=1, ge=1, le=256, description="processes, at most one a core")
    user: str = Field(default="dispatcher-proxy", description="user to become when started as root")
    routing: Literal["session", "subdomain"] = Field(
        default="session", description="one host for all, or AGENT.DOMAIN: an origin of its own for each agent"
    )
    prefix: str = Field(default="/auth", description="path of the portal")
    public_url: Origin = Field(default="", description="as people see it, such as https://apps.example.org")
    trusted_proxies: NetworkAddresses = Field(default=[], description="networks whose X-Forwarded-* are believed")
    proxy_protocol: Flag = Field(default=False, description="expect PROXY protocol v2 on every connection")
    feed_grace: Duration = Field(default=600.0, description="how long to serve what is known without the manager")
    hold: Duration = Field(default=5.0, description="how long a request waits for an agent that wakes up")
    access_log: str = Field(default="", description="file, or - for standard output; off when empty")
    metrics_by_agent: Flag = Field(default=False, description="label metrics with the agent, not just the app")
    head_bytes: Size = Field(default=65536, description="largest head of a request")
    head_fields: Count = Field(default=100, ge=10, description="most header fields of a request")
    head_timeout: Duration = Field(default=15.0, description="longest time for the head of a request to arrive")
    idle_timeout: Duration = Field(default=75.0, description="of a kept-alive connection without a request")
    body_timeout: Duration = Field(default=60.0, description="longest silence in the middle of a body")
    upstream_timeout: Duration = Field(default=600.0, description="longest wait for an agent's answer to begin")
    connections: Count = Field(default=20000, ge=16, description="per worker")
    connections_per_address: Count = Field(
        default=2000, ge=1, description="per worker, IPv6 by the /64; loopback and trusted proxies are exempt"
    )
    in_flight_per_agent: Count = Field(default=1000, ge=1, description="per worker")
    drain_timeout: Duration = Field(default=30.0, description="how long a stop waits for what is in flight")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is logged, to standard error"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="for people or for programs")

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value) or "/." in value:
            raise ValueError("a path such as /auth: it begins with / and does not end with it")
        return value


class AuthConfig(Table):
    """``[auth]``; tables below it belong to the authenticator of that name."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    authenticator: str = Field(default="local", description="who checks passwords: local, or a plugin's name")
    session_lifetime: Duration = Field(default=7 * 86400.0, description="a session ends then, used or not")
    session_idle: Duration = Field(default=86400.0, description="a session ends after that long without a request")
    hash_workers: Count = Field(default=2, ge=1, le=64, description="password checks at the same time")
    hash_queue: Count = Field(default=64, ge=1, description="password checks that may wait; more get 429")


class AppDefaults(Table):
    """What ``[defaults]`` may set for every app and an app may override."""

    provider: str = Field(default="subprocess", description="the plugin that isolates the agents")
    memory: Size | None = Field(default=None, description="most memory of one agent")
    swap: Size | None = Field(default=None, description="most swap, beyond memory")
    cpus: Number | None = Field(default=None, gt=0, description="cores, 0.5 for half of one")
    pids: Count | None = Field(default=None, ge=1, description="most processes and threads")
    disk: Size | None = Field(default=None, description="most data")
    network: Network = Field(
        default=Network.NONE,
        description="nothing, the outside but nothing of this host, or all that the host reaches",
    )
    environment: Environment = Field(
        default={}, description="variables of the app; an app's are added to the defaults'"
    )
    health: UrlPath = Field(default="/", description="path that answers below 500 when the app is ready")
    prepare_timeout: Duration = Field(
        default=3600.0, description="for pulling or building what the app starts from"
    )
    start_timeout: Duration = Field(default=60.0, description="from start to ready")
    stop_grace: Duration = Field(default=10.0, description="from the polite to the forced end")
    idle_timeout: MaybeDuration = Field(default=1800.0, description="without use; false for never")
    idle_action: Literal["suspend", "hibernate", "stop"] = Field(
        default="suspend", description="what happens to an idle agent; stop, where the provider cannot do better"
    )
    idle_stop: MaybeDuration = Field(default=False, description="a sleeping agent is stopped after that long")
    busy_grace: MaybeDuration = Field(
        default=False, description="CPU use keeps an idle agent up for that long at most"
    )
    max_restarts: Count = Field(default=5, ge=0, description="within ten minutes, then the agent is failed")
    credentials: Literal["none", "stdin"] = Field(
        default="none", description="stdin: the app gets the login's name and password on its standard input"
    )


class AppConfig(AppDefaults):
    """``[apps.NAME]``; the tables below it belong to the providers of that name."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    title: str = Field(default="", description="as people see it; the name when empty")
    secrets: Secrets = Field(
        default={},
        description='`NAME = "/path/of/file"` or `NAME = "env:VARIABLE"`: read by the manager when an agent '
        "starts, and given to the app as the file `$DISPATCHER_SECRETS/NAME`",
    )

    def provider_table(self, provider: str) -> dict[str, Any]:
        """Return ``[apps.NAME.PROVIDER]`` as written."""
        return dict((self.model_extra or {}).get(provider, {}))
