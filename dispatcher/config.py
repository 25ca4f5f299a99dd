"""One TOML file -> validated models.  Reads files; touches nothing else.

Every error names the key's full path, what was found, what was expected and the nearest valid key; all
errors of a file are collected before any is shown.  Provider tables (``[providers.X]``, ``[apps.Y.X]``) are
validated by the plugin's own models, once `Plugins` has loaded it: `validate_providers`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dispatcher import names, places
from dispatcher.errors import BadRequest, ConfigError
from dispatcher.model import App, Limits, Network

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if typing.TYPE_CHECKING:
    from dispatcher.plugins import Plugins

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def duration(value: object) -> object:
    """Return seconds for ``"30m"``, ``"1h30m"``, ``"500ms"`` or a number of seconds."""
    if isinstance(value, str):
        parts = _DURATION.findall(value)
        if not parts or _DURATION.sub("", value).strip():
            raise ValueError('a duration such as "90s", "30m" or "1h30m"')
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError('a duration such as "90s", "30m" or "1h30m"')
    return value


def size(value: object) -> object:
    """Return bytes for ``"512M"``, ``"1.5G"`` or a number of bytes.  Powers of 1024."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise ValueError('a size such as "512M" or "2G"')
        return int(float(match[1]) * _FACTORS[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError('a size such as "512M" or "2G"')
    return value


Duration = Annotated[float, BeforeValidator(duration), Field(ge=0)]
#: A duration, or false for *never*.
MaybeDuration = Annotated[float | Literal[False], BeforeValidator(lambda v: v if v is False else duration(v))]
Size = Annotated[int, BeforeValidator(size), Field(gt=0)]


class Table(BaseModel):
    """A table of the configuration: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ManagerConfig(Table):
    """``[manager]``"""

    listen: list[str] = Field(
        default=[], description="TCP addresses with TLS, such as 0.0.0.0:4443; none by default"
    )
    state_dir: Path = Field(default_factory=places.state_dir, description="database, agents' data, logs")
    run_dir: Path = Field(
        default_factory=places.run_dir, description="sockets; short, as a path has under 108 bytes"
    )
    database: str = Field(default="", description="SQLAlchemy URL; by default SQLite in state_dir")
    tls_cert: Path | None = Field(default=None, description="for listen; self-signed on demand when absent")
    tls_key: Path | None = None
    client_ca: Path | None = Field(default=None, description="certificates signed by it may administer over TLS")
    token_file: Path | None = Field(default=None, description="tokens that may administer over TLS, one a line")
    admin_group: str = Field(default="dispatcher-admin", description="group that may use manager.sock")
    proxy_group: str = Field(
        default="dispatcher-proxy", description="group that may use proxy.sock and reach agents"
    )
    uid_range: tuple[int, int] = Field(default=(200000, 265535), description="host user ids for agents, as root")
    threads: int = Field(default=20, ge=2, le=256, description="threads of the REST API")
    provider_threads: int = Field(default=32, ge=1, le=512, description="threads per provider")
    reconcile_interval: Duration = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    @field_validator("uid_range")
    @classmethod
    def _range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1000 <= value[0] < value[1] < 2**32 - 1:
            raise ValueError("two user ids from 1000 on, the lower one first")
        return value


class ProxyConfig(Table):
    """``[proxy]``"""

    listen: list[str] = Field(
        default=["127.0.0.1:8080"],
        description="HOST:PORT, [IPv6]:PORT, unix:/PATH, or systemd (socket activation)",
    )
    tls_cert: Path | None = None
    tls_key: Path | None = None
    redirect_listen: list[str] = Field(default=[], description="plain HTTP addresses that redirect to HTTPS")
    hsts: MaybeDuration = Field(default=False, description="max-age of Strict-Transport-Security, with TLS")
    workers: int = Field(default=1, ge=1, le=256)
    user: str = Field(default="dispatcher-proxy", description="user to become when started as root")
    routing: Literal["session", "subdomain"] = "session"
    prefix: str = Field(default="/auth", description="path of the portal")
    public_url: str = Field(default="", description="as people see it, such as https://apps.example.org")
    admin_listen: list[str] = Field(default=[], description="address of the admin pages, an origin of their own")
    trusted_proxies: list[str] = Field(default=[], description="networks whose X-Forwarded-* are believed")
    proxy_protocol: bool = Field(default=False, description="expect PROXY protocol v2 on every connection")
    feed_grace: Duration = Field(default=600.0, description="how long to serve what is known without the manager")
    hold: Duration = Field(default=5.0, description="how long a request waits for an agent that wakes up")
    access_log: str = Field(default="", description="file, or - for standard output; off when empty")
    metrics_by_agent: bool = False
    head_bytes: Size = 65536
    head_fields: int = Field(default=100, ge=10)
    head_timeout: Duration = 15.0
    idle_timeout: Duration = Field(default=75.0, description="of a kept-alive connection without a request")
    body_timeout: Duration = Field(default=60.0, description="longest silence in the middle of a body")
    upstream_timeout: Duration = Field(default=600.0, description="longest wait for an agent's answer to begin")
    connections: int = Field(default=20000, ge=16, description="per worker")
    connections_per_address: int = Field(default=2000, ge=1, description="per worker; loopback is exempt")
    in_flight_per_agent: int = Field(default=1000, ge=1, description="per worker")
    drain_timeout: Duration = Field(default=30.0, description="how long a stop waits for what is in flight")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value) or "/." in value:
            raise ValueError("a path such as /auth: it begins with / and does not end with it")
        return value

    @model_validator(mode="after")
    def _tls(self) -> ProxyConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.routing == "subdomain" and not self.public_url:
            raise ValueError('routing = "subdomain" needs public_url: agents live below its host')
        return self


class AuthConfig(Table):
    """``[auth]``; tables below it belong to the authenticator of that name."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    authenticator: str = "local"
    session_lifetime: Duration = Field(default=7 * 86400.0, description="a session ends then, used or not")
    session_idle: Duration = Field(default=86400.0, description="a session ends after that long without a request")
    hash_workers: int = Field(default=2, ge=1, le=64, description="password checks at the same time")
    hash_queue: int = Field(default=64, ge=1, description="password checks that may wait; more get 429")


class AppDefaults(Table):
    """What ``[defaults]`` may set for every app and an app may override."""

    provider: str = "subprocess"
    memory: Size | None = None
    swap: Size | None = None
    cpus: float | None = Field(default=None, gt=0)
    pids: int | None = Field(default=None, ge=1)
    disk: Size | None = None
    network: Network = Network.NONE
    environment: dict[str, str] = {}
    health: str = Field(default="/", description="path that answers below 500 when the app is ready")
    start_timeout: Duration = Field(default=60.0, description="from start to ready")
    stop_grace: Duration = Field(default=10.0, description="from the polite to the forced end")
    idle_timeout: MaybeDuration = Field(default=1800.0, description="without use; false for never")
    idle_action: Literal["suspend", "hibernate", "stop"] = "suspend"
    idle_stop: MaybeDuration = Field(default=False, description="a sleeping agent is stopped after that long")
    busy_grace: MaybeDuration = Field(
        default=False, description="CPU use keeps an idle agent up for that long at most"
    )
    max_restarts: int = Field(default=5, ge=0, description="within ten minutes, then the agent is failed")
    credentials: Literal["none", "stdin"] = "none"


class AppConfig(AppDefaults):
    """``[apps.NAME]``; the tables below it belong to the providers of that name."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    title: str = ""

    def provider_table(self, provider: str) -> dict[str, Any]:
        """Return ``[apps.NAME.PROVIDER]`` as written."""
        return dict((self.model_extra or {}).get(provider, {}))


class Config(Table):
    """The whole file."""

    manager: ManagerConfig = ManagerConfig()
    proxy: ProxyConfig = ProxyConfig()
    auth: AuthConfig = AuthConfig()
    defaults: AppDefaults = AppDefaults()
    default_app: str = Field(default="", description="app of new users; the only one, or 'demo', when empty")
    plugins: list[str] = Field(default=[], description="plugins that observe, loaded besides the configured ones")
    providers: dict[str, dict[str, Any]] = {}
    apps: dict[str, AppConfig] = {}

    def app(self, name: str) -> AppConfig:
        """Return an app's table.

        :raises ConfigError: there is none of that name.
        """
        if name not in self.apps:
            near = difflib.get_close_matches(name, self.apps, 1)
            raise ConfigError(
                f"There is no app {names.printable(name)}",
                why="configured are: " + (", ".join(sorted(self.apps)) or "none"),
                fix=f"did you mean {near[0]!r}?" if near else "add it to the configuration",
            )
        return self.apps[name]

    @property
    def secure(self) -> bool:
        """Whether browsers reach the proxy over HTTPS, by its own TLS or a front proxy's."""
        return self.proxy.tls_cert is not None or self.proxy.public_url.startswith("https://")

    def template(self, name: str, plugins: Plugins) -> App:
        """Return an app as its provider gets it, the provider's own options validated.

        :raises ConfigError: as `app`, or the provider's options are wrong; :raises PluginError: as `Plugins.load`.
        """
        app = self.app(name)
        options = _validate(
            plugins.provider(app.provider).AppOptions,
            app.provider_table(app.provider),
            f"apps.{name}.{app.provider}",
        )
        return App(
            name=name,
            provider=app.provider,
            options=options,
            limits=Limits(memory=app.memory, swap=app.swap, cpus=app.cpus, pids=app.pids, disk=app.disk),
            network=app.network,
            environment=app.environment,
            credentials=app.credentials,
        )

    def provider_options(self, name: str, plugins: Plugins) -> BaseModel:
        """Return ``[providers.NAME]``, validated by the provider's `Options`.

        :raises ConfigError: it is wrong; :raises PluginError: as `Plugins.load`.
        """
        return _validate(plugins.provider(name).Options, self.providers.get(name, {}), f"providers.{name}")

    def validate_providers(self, plugins: Plugins) -> None:
        """Load every configured provider and validate all its tables.

        :raises ConfigError: naming every fault found.
        """
        problems = []
        checks = [(self.provider_options, name) for name in self.providers]
        checks += [(self.template, name) for name in self.apps]  # type: ignore[misc]
        for check, name in checks:
            try:
                check(name, plugins)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("The configuration is wrong", why="; ".join(dict.fromkeys(problems)))


DEMO = {
    "title": "Demo",
    "subprocess": {"command": [sys.executable, "-m", "dispatcher.demo", "--unix", "{socket}"]},
}


def load(path: Path | None = None) -> Config:
    """Read and validate the configuration; a default one with the demo app when the default file is absent.

    :raises ConfigError: the file cannot be read, is no TOML, or says something wrong.
    """
    chosen = path or places.config_file()
    try:
        text = chosen.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        if path is not None or os.environ.get("DISPATCHER_CONFIG"):
            raise ConfigError(
                f"Cannot read {chosen}", why="there is no such file", fix="check --config"
            ) from error
        return parse({})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {chosen}", why=str(getattr(error, "strerror", None) or error)) from error
    try:
        return parse(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{chosen} is no TOML", why=str(error)) from error
    except ConfigError as error:
        raise ConfigError(f"{chosen} is wrong", why=error.why or error.what, fix=error.fix) from error


def parse(data: Mapping[str, Any]) -> Config:
    """Validate a parsed file: defaults are merged into apps, names checked.

    :raises ConfigError: naming every fault found.
    """
    data = dict(data)
    apps = data.get("apps", {"demo": DEMO} if "apps" not in data else {})
    defaults = data.get("defaults", {})
    if isinstance(apps, Mapping) and isinstance(defaults, Mapping):
        data["apps"] = {
            name: _merge(defaults, app) if isinstance(app, Mapping) else app for name, app in apps.items()
        }
    config = typing.cast("Config", _validate(Config, data, ""))
    problems = list(_semantic_problems(config))
    if problems:
        raise ConfigError("The configuration is wrong", why="; ".join(problems))
    return config


def _merge(defaults: Mapping[str, Any], app: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in defaults.items() if key in AppDefaults.model_fields} | dict(app)
    if isinstance(defaults.get("environment"), Mapping) and isinstance(app.get("environment"), Mapping):
        merged["environment"] = {**defaults["environment"], **app["environment"]}
    return merged


def _semantic_problems(config: Config) -> Iterator[str]:
    for name, app in config.apps.items():
        try:
            names.app_name(name)
        except BadRequest as error:
            yield f"apps.{name}: {error.why}"
        for key, value in (app.model_extra or {}).items():
            if not isinstance(value, dict):
                yield f"apps.{name}.{key}: unknown key{_nearest(key, AppConfig)}"
        if not app.health.startswith("/"):
            yield f"apps.{name}.health: found {names.printable(app.health)}, expected a path that begins with /"
    for key, value in (config.auth.model_extra or {}).items():
        if not isinstance(value, dict):
            yield f"auth.{key}: unknown key{_nearest(key, AuthConfig)}"
    if config.default_app and config.default_app not in config.apps:
        yield f"default_app: there is no app {names.printable(config.default_app)}"


def _validate(model: type[BaseModel], data: Mapping[str, Any], path: str) -> BaseModel:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_problem(model, item, path) for item in error.errors(include_url=False)]
        raise ConfigError("The configuration is wrong", why="; ".join(dict.fromkeys(problems))) from error


def _problem(model: type[BaseModel], item: Any, path: str) -> str:
    where = [str(part) for part in item["loc"] if not _is_union_tag(str(part))]
    full = ".".join([*([path] if path else []), *where]) or "the file"
    if item["type"] == "extra_forbidden":
        return f"{full}: unknown key{_nearest(where[-1], _model_at(model, where[:-1]))}"
    if item["type"] == "missing":
        return f"{full}: is missing"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if item["type"] == "value_error" and isinstance(item["input"], (dict, BaseModel)):
        return f"{full}: {message}"
    return f"{full}: found {names.printable(item['input'])}, expected {message}"


def _is_union_tag(part: str) -> bool:
    return "[" in part or part in {"float", "literal"}


def _model_at(model: type[BaseModel] | None, where: list[str]) -> type[BaseModel] | None:
    for part in where:
        if model is None:
            return None
        field = model.model_fields.get(part)
        candidate = field.annotation if field else model
        model = next((c for c in _classes(candidate)), None) if field else model
    return model


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _classes(argument)


def _nearest(key: str, model: type[BaseModel] | None) -> str:
    if model is None:
        return ""
    near = difflib.get_close_matches(key, model.model_fields, 1, 0.6)
    if near:
        return f", did you mean {near[0]!r}?"
    return ", valid are: " + ", ".join(sorted(model.model_fields))
