"""Reads the configuration: one TOML file becomes validated models.

Every error names the key's full path, the value found, the value expected and the nearest valid key; all errors
of a file are reported at once.  `Config.validate_providers` validates the tables of plugins (``[providers.X]``,
``[apps.Y.X]``) with the plugins' own models.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from dispatcher.config import default_paths
from dispatcher.config import groups as group_rules
from dispatcher.config.groups import GroupConfig
from dispatcher.config.messages import did_you_mean, printable_key, problems, shown, unknown_key, validate, wrong
from dispatcher.config.schema import AppConfig, AppDefaults, AuthConfig, ManagerConfig, ProxyConfig
from dispatcher.plugin import names
from dispatcher.plugin.authenticator import WebAuthenticator
from dispatcher.plugin.errors import BadRequest, ConfigError, PluginError
from dispatcher.plugin.model import App
from dispatcher.plugin.options import Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if typing.TYPE_CHECKING:
    from dispatcher.config.plugins import Plugins

__all__ = ["AppConfig", "AppDefaults", "AuthConfig", "Config", "ManagerConfig", "ProxyConfig"]


class Config(Table):
    """The whole file."""

    manager: ManagerConfig = ManagerConfig()
    proxy: ProxyConfig = ProxyConfig()
    auth: AuthConfig = AuthConfig()
    defaults: AppDefaults = AppDefaults()
    default_app: str = Field(default="", description="app of new users; by default the only app, or 'demo'")
    plugins: list[str] = Field(default=[], description="additional plugins to load: observers of events")
    providers: dict[str, dict[str, Any]] = {}
    apps: dict[str, AppConfig] = {}
    groups: dict[str, GroupConfig] = {}
    _file: Path | None = PrivateAttr(default=None)  # for errors in the tables of plugins
    _digest: bytes = PrivateAttr(default=b"")

    @property
    def outdated(self) -> bool:
        """Whether its file was changed, or made unreadable, after it was read."""
        try:
            return self._file is not None and _digest(self._file.read_bytes()) != self._digest
        except OSError:
            return True

    def app(self, name: str) -> AppConfig:
        """Return an app's table.

        :raises ConfigError: there is no app of that name.
        """
        if name not in self.apps:
            raise ConfigError(
                f"There is no app {names.printable(name)}",
                why="configured are: " + (", ".join(sorted(self.apps)) or "none"),
                fix=did_you_mean(name, self.apps, "add it to the configuration"),
            )
        return self.apps[name]

    @property
    def secure(self) -> bool:
        """Whether browsers reach the proxy over HTTPS, its own or a front proxy's."""
        return self.proxy.tls_cert is not None or self.proxy.public_url.startswith("https://")

    def template(self, name: str, plugins: Plugins) -> App:
        """Return an app for its provider, with the provider's options validated.

        :raises ConfigError: as `app`, or invalid provider options; :raises PluginError: as `Plugins.load`.
        """
        app = self.app(name)
        model, path = plugins.provider(app.provider).AppOptions, f"apps.{name}.{app.provider}"
        try:
            ref = plugins.ref("provider", app.provider)
            options = validate(ref, model, app.provider_table(app.provider), path, self._file)
        except ConfigError as error:
            others = [key for key in app.model_extra or {} if key in plugins.available()]
            if others and app.provider not in others:  # there is a table, but of another provider
                hint = f'{error.why} (there is [apps.{name}.{others[0]}]: add provider = "{others[0]}"?)'
                raise wrong([hint], self._file) from error
            raise
        return App(
            name=name,
            provider=app.provider,
            options=options,
            limits=app.limits(),
            network=app.network,
            environment=app.environment,
            credentials=app.credentials,
        )

    def provider_options(self, name: str, plugins: Plugins) -> BaseModel:
        """Return ``[providers.NAME]``, validated by the provider's `Options`.

        :raises ConfigError: invalid; :raises PluginError: as `Plugins.load`.
        """
        model = plugins.provider(name).Options
        table, ref = self.providers.get(name, {}), plugins.ref("provider", name)
        return validate(ref, model, table, f"providers.{name}", self._file)

    def authenticator_options(self, name: str, plugins: Plugins) -> BaseModel:
        """Return ``[auth.NAME]`` or ``[auth.PLUGIN.OWN]``, validated by the authenticator's `Options`.

        :param name: an entry of ``auth.authenticator``.
        :raises ConfigError: invalid; :raises PluginError: as `Plugins.load`.
        """
        plugin, _, own = name.partition(".")
        cls = plugins.authenticator(plugin)
        table = (self.auth.model_extra or {}).get(plugin, {})
        if bool(own) is not bool(cls.several):
            expected = (
                f"[auth.{plugin}.NAME] and {plugin}.NAME" if cls.several else f"[auth.{plugin}] and {plugin}"
            )
            raise ConfigError(
                f"auth.authenticator: {names.printable(name)} is not the name of an authenticator",
                why=f"the plugin {plugin} is configured by {expected}",
                fix="correct the name",
            )
        if issubclass(cls, WebAuthenticator) and not self.proxy.public_url:
            raise ConfigError(
                f"proxy.public_url: is missing, the authenticator {names.printable(name)} requires it",
                why="the other site sends browsers back to this address",
            )
        if own:
            table = table.get(own, {}) if isinstance(table, Mapping) else {}
        return validate(plugins.ref("authenticator", name), cls.Options, table, f"auth.{name}", self._file)

    def validate_providers(self, plugins: Plugins) -> None:
        """Load every configured provider and validate all tables of plugins.

        :raises ConfigError: names every error.
        """
        if found := list(self.plugin_problems(plugins)):
            raise wrong(found, self._file)

    def plugin_problems(self, plugins: Plugins) -> Iterator[str]:
        """Load every configured plugin and yield the errors in their tables."""
        for name in self.plugins:
            yield from caught("plugins", plugins.load, name)
        for name in self.providers:
            yield from caught(f"providers.{name}", self.provider_options, name, plugins)
        for name in self.apps:
            yield from caught(f"apps.{name}.provider", self.template, name, plugins)
        known = plugins.available()
        for chosen in self.auth.authenticators:
            plugin = chosen.partition(".")[0]
            if plugin != "local" and plugin not in known:
                hint = did_you_mean(plugin, ["local", *known], "install the distribution that provides it")
                yield f"auth.authenticator: there is no plugin {names.printable(plugin)}, {hint}"
            elif chosen != "local":
                yield from caught("auth.authenticator", self.authenticator_options, chosen, plugins)
        for path, table in (*((f"apps.{name}", app) for name, app in self.apps.items()), ("auth", self.auth)):
            for key, value in (table.model_extra or {}).items():
                if key not in known and key != "local" and isinstance(value, Mapping):
                    words = [*known, *type(table).model_fields]
                    hint = did_you_mean(key, words, f"installed are: {', '.join(known)}")
                    yield f"{path}.{key}: there is no plugin of this name, {hint}"


DEMO = {
    "title": "Demo",
    "subprocess": {"command": [sys.executable, "-m", "dispatcher.demo", "--unix", "{socket}"]},
}


def load(path: Path | None = None) -> Config:
    """Read and validate the configuration; without a default file, the configuration of the demo app.

    :raises ConfigError: the file cannot be read, is not TOML, or is invalid.
    """
    config, found = read(path)
    if found:
        raise wrong(found, config._file)  # noqa: SLF001 - private to this module
    return config


def read(path: Path | None = None) -> tuple[Config, list[str]]:
    """Return the configuration without its invalid values, and an error for each of them.

    :raises ConfigError: the file cannot be read, or is not TOML.
    """
    chosen = path or default_paths.config_file()
    try:
        text = chosen.read_bytes()
        data = tomllib.loads(text.decode("utf-8"))
    except FileNotFoundError as error:
        if path is not None or os.environ.get("DISPATCHER_CONFIG"):
            raise ConfigError(
                f"Cannot read {chosen}",
                why="there is no such file",
                fix="check --config, or run `dispatcher init`",
            ) from error
        return _parse({})
    except UnicodeDecodeError as error:
        raise ConfigError(f"{chosen} is not TOML", why="it is not UTF-8", fix="save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{chosen} is not TOML", why=str(error)) from error
    except OSError as error:
        raise default_paths.unreadable(chosen, error) from error
    config, found = _parse(data)
    config._file, config._digest = chosen, _digest(text)  # noqa: SLF001 - private to this module
    return config, found


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def parse(data: Mapping[str, Any]) -> Config:
    """Validate a parsed file, with `[defaults]` merged into apps.

    :raises ConfigError: names every error.
    """
    config, found = _parse(data)
    if found:
        raise wrong(found)
    return config


def _parse(data: Mapping[str, Any]) -> tuple[Config, list[str]]:
    data = dict(data)
    written = data.get("apps", {"demo": DEMO})
    defaults = data.get("defaults", {})
    if isinstance(written, Mapping) and isinstance(defaults, Mapping):
        data["apps"] = {
            name: _merge(defaults, app) if isinstance(app, Mapping) else app for name, app in written.items()
        }
    found: list[str] = []
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        # An invalid default is reported in [defaults], not in each app.
        found += problems(Config, error, skip=lambda where: _inherited(where, written))
        config = _without(data, error)
    return config, [*found, *_contradictions(data)]


def _without(data: Mapping[str, Any], error: ValidationError) -> Config:
    """Return a configuration without its invalid values, so that the tables of plugins can be checked too."""
    data = copy.deepcopy(dict(data))
    for item in error.errors(include_url=False):
        table: Any = data
        for part in item["loc"][:-1]:
            if not isinstance(table.get(part), dict):
                break
            table = table[part]
        else:
            part = item["loc"][-1]
        table.pop(part, None)
    try:
        return Config.model_validate(data)
    except ValidationError:
        return Config()


def _merge(defaults: Mapping[str, Any], app: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in defaults.items() if key in AppDefaults.model_fields} | dict(app)
    if isinstance(defaults.get("environment"), Mapping) and isinstance(app.get("environment"), Mapping):
        merged["environment"] = {**defaults["environment"], **app["environment"]}
    return merged


def _inherited(where: tuple[str | int, ...], written: Any) -> bool:
    """Return whether the error at `where` is in a value that the app inherited."""
    if len(where) < 3 or where[0] != "apps":
        return False
    table = written[where[1]]
    for part in where[2:4]:
        if not isinstance(table, Mapping):
            return False
        if part not in table:
            return part in AppDefaults.model_fields or where[2] == "environment"
        table = table[part]
    return False


def caught(key: str, call: Callable[..., object], *arguments: object) -> Iterator[str]:
    """Yield the errors of a call; where they name no key of their own, `key` is named."""
    try:
        call(*arguments)
    except PluginError as error:
        yield f"{key}: {str(error)[0].lower()}{str(error)[1:]}"
    except ConfigError as error:
        yield from error.details.get("problems", [str(error)])


def _contradictions(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors between several keys, from the file's own values."""
    manager, proxy, auth, apps = (_table(data, name) for name in ("manager", "proxy", "auth", "apps"))
    for path, table in (("manager", manager), ("proxy", proxy)):
        for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
            if table.get(one) and not table.get(other):
                yield f"{path}.{other}: is missing, {one} requires it"
    if proxy.get("routing") == "subdomain" and not proxy.get("public_url"):
        yield 'proxy.public_url: is missing, routing = "subdomain" requires it: agents get subdomains of its host'
    for name, app in apps.items():
        try:
            names.app_name(name)
        except BadRequest as error:
            yield f"apps.{printable_key(name)}: {error.why}"
        yield from _stray(f"apps.{printable_key(name)}", app, AppConfig)
    yield from _stray("auth", auth, AuthConfig)
    default_app = data.get("default_app")
    if isinstance(default_app, str) and default_app and default_app not in apps:
        hint = did_you_mean(default_app, apps, f"there are: {', '.join(apps) or 'none'}")
        yield f"default_app: there is no app {shown(default_app)}, {hint}"
    yield from group_rules.faults(data.get("groups"), list(apps))


def _stray(path: str, table: Any, model: type[BaseModel]) -> Iterator[str]:
    """Yield the unknown keys of a table that may contain tables of plugins."""
    if isinstance(table, Mapping):
        for key, value in table.items():
            if key not in model.model_fields and not isinstance(value, Mapping):
                yield unknown_key(path, key, model, table.get("provider", AppDefaults().provider))


def _table(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = data.get(name)
    return found if isinstance(found, Mapping) else {}
