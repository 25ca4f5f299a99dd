"""config check, config show."""

from __future__ import annotations

import contextlib
import typing
from typing import Any

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.common import redact
from dispatcher.plugin.errors import ConfigError

if typing.TYPE_CHECKING:
    from pydantic import BaseModel

    from dispatcher.config.load import Config
    from dispatcher.config.plugins import Plugins


@click.group(epilog="\b\nExamples:\n  dispatcher config check\n  dispatcher --config new.toml config show")
def config() -> None:
    """Check and show the configuration."""


@config.command(epilog="\b\nExample:\n  dispatcher --config new.toml config check")
@pass_cli
def check(cli: Cli) -> None:
    """Read the configuration, including the plugins' tables, and report every fault."""
    from dispatcher.config import default_paths

    apps = ", ".join(sorted(checked(cli).apps)) or "none"
    path = cli.config_path or default_paths.config_file()
    if path.exists():
        cli.out.line(f"the configuration is valid: {path} (apps: {apps})")
    else:
        cli.out.line(f"there is no {path}: the defaults are in force (apps: {apps})")
    if cli.config_path is None and path != default_paths.SYSTEM_CONFIG and default_paths.SYSTEM_CONFIG.exists():
        cli.out.note(f"{default_paths.SYSTEM_CONFIG} is another file: name it with --config to check it")


def checked(cli: Cli) -> Config:
    """Return the configuration after all checks; warnings are noted.

    :raises ConfigError: names every fault.
    """
    from dispatcher.config.app_secrets import check_secrets
    from dispatcher.config.check import faults as faults_here
    from dispatcher.config.load import read
    from dispatcher.config.messages import wrong
    from dispatcher.config.plugins import Plugins
    from dispatcher.plugin.model import Level

    found, faults = read(cli.config_path)
    reported = {_key(fault) for fault in faults}  # `found` lacks their values: the same keys seem to be missing
    faults += [fault for fault in faults_here(found, Plugins()) if _key(fault) not in reported]
    findings = [each for name, app in found.apps.items() for each in check_secrets(name, app.secrets)]
    faults += [each.what for each in findings if each.level is Level.ERROR]
    if faults:
        raise wrong(faults, cli.config_path)
    for finding in findings:
        cli.out.note(f"warning: {finding.what} ({finding.fix})")
    return found


def _key(fault: str) -> str:
    return fault.partition(": ")[0]


@config.command(epilog="\b\nExamples:\n  dispatcher config show\n  dispatcher config show --json")
@pass_cli
def show(cli: Cli) -> None:
    """Print the effective configuration as TOML, with defaults filled in and secrets masked."""
    from dispatcher.config.plugins import Plugins

    found = cli.config()
    data = redact.configuration(effective(found, Plugins()))
    for name, app in found.apps.items():
        data["apps"][name]["secrets"] = dict(app.secrets)  # paths and names of variables, not contents
    if cli.out.json:
        cli.out.data(data)
    else:
        import tomli_w

        click.echo(tomli_w.dumps(data), nl=False)


def effective(found: Config, plugins: Plugins) -> dict[str, Any]:
    """Return the configuration with all defaults, in the form of its file; unset keys are left out.

    A provider's table gets its defaults only where its plugin can be loaded.
    """

    def tables(model: BaseModel, **options: Any) -> dict[str, Any]:
        return model.model_dump(mode="json", exclude_none=True, **options)

    data = tables(found, exclude={"apps", "providers"}) | {"providers": {}, "apps": {}}
    for name in sorted({*found.providers, *(app.provider for app in found.apps.values())}):
        try:
            data["providers"][name] = tables(found.provider_options(name, plugins))
        except ConfigError:
            data["providers"][name] = dict(found.providers.get(name, {}))
    for name, app in found.apps.items():
        data["apps"][name] = tables(app)
        with contextlib.suppress(ConfigError):
            data["apps"][name][app.provider] = tables(found.template(name, plugins).options)
    return data
