"""config check, config show.  Reads the configuration and imports the plugins that it names."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.plugin.errors import ConfigError

if typing.TYPE_CHECKING:
    from dispatcher.config.load import Config
    from dispatcher.config.plugins import Plugins

MASK = "********"
_SECRET = re.compile(r"(?i)passw|secret|token|api_?key|private_?key")
_USERINFO = re.compile(r"(?<=://)([^/?#@:]*):[^/?#]*(?=@)")


@click.group(epilog="\b\nExamples:\n  dispatcher config check\n  dispatcher --config new.toml config show")
def config() -> None:
    """Check and show the configuration."""


@config.command(epilog="\b\nExample:\n  dispatcher --config new.toml config check")
@pass_cli
def check(cli: Cli) -> None:
    """Read the configuration, the plugins' tables included, and name every fault."""
    from dispatcher.config.app_secrets import check_secrets
    from dispatcher.config.layout import Paths
    from dispatcher.config.messages import wrong
    from dispatcher.config.plugins import Plugins
    from dispatcher.plugin.model import Level

    found = cli.config()
    Paths.of(found)
    found.validate_providers(Plugins())
    findings = [each for name, app in found.apps.items() for each in check_secrets(name, app.secrets)]
    if faults := [each.what for each in findings if each.level is Level.ERROR]:
        raise wrong(faults)
    for finding in findings:
        cli.out.note(f"warning: {finding.what} ({finding.fix})")
    apps = ", ".join(sorted(found.apps)) or "none"
    cli.out.line(f"the configuration is good (apps: {apps})")


@config.command(epilog="\b\nExamples:\n  dispatcher config show\n  dispatcher config show --json")
@json_option
@pass_cli
def show(cli: Cli) -> None:
    """Print the configuration that is in force, defaults filled in and secrets masked, as TOML."""
    from dispatcher.config.plugins import Plugins

    found = cli.config()
    data = masked(effective(found, Plugins()))
    for name, app in found.apps.items():
        data["apps"][name]["secrets"] = dict(app.secrets)  # paths and names of variables, not contents
    if cli.out.json:
        cli.out.data(data)
    else:
        import tomli_w

        click.echo(tomli_w.dumps(data), nl=False)


def effective(found: Config, plugins: Plugins) -> dict[str, Any]:
    """Return the configuration with all defaults, as a file could say it: what is not set is left out.

    A provider's table is completed where its plugin can be loaded.
    """
    data: dict[str, Any] = found.model_dump(mode="json", exclude={"apps", "providers"})
    names = sorted({*found.providers, *(app.provider for app in found.apps.values())})
    data["providers"] = {}
    for name in names:
        try:
            data["providers"][name] = found.provider_options(name, plugins).model_dump(mode="json")
        except ConfigError:
            data["providers"][name] = dict(found.providers.get(name, {}))
    data["apps"] = {}
    for name, app in found.apps.items():
        table = app.model_dump(mode="json")
        try:
            table[app.provider] = found.template(name, plugins).options.model_dump(mode="json")
        except ConfigError:
            pass
        data["apps"][name] = table
    return typing.cast("dict[str, Any]", _without_none(data))


def masked(data: Any, key: str = "") -> Any:
    """Return `data` with what looks like a secret masked: by its key's name, or a password in a URL."""
    if isinstance(data, Mapping):
        return {name: masked(value, str(name)) for name, value in data.items()}
    if isinstance(data, list):
        return [masked(value, key) for value in data]
    if isinstance(data, str) and data:
        if _SECRET.search(key) and not key.endswith(("_file", "_dir", "_path")):
            return MASK
        return _USERINFO.sub(rf"\1:{MASK}", data)
    return data


def _without_none(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _without_none(value) for key, value in data.items() if value is not None}
    if isinstance(data, list):
        return [_without_none(value) for value in data]
    return data
