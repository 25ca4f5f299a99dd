"""plugins list."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.plugin.errors import ManagerUnreachable

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json


@click.group(epilog="\b\nExample:\n  dispatcher plugins list")
def plugins() -> None:
    """List plugins: providers, authenticators, observers."""


@plugins.command("list", epilog="\b\nExample:\n  dispatcher plugins list")
@pass_cli
def list_plugins(cli: Cli) -> None:
    """List the installed plugins with their distributions, whether the configuration uses them, and their faults.

    A plugin that nothing uses is not imported, so it is not known what it is.  Without a manager on this machine,
    this program loads the plugins of the configuration itself.
    """
    try:
        found = cli.client().plugins()["plugins"]
    except ManagerUnreachable as error:
        if not cli.url.startswith("unix:"):
            raise
        cli.out.note(f"{error.what}: {error.why}; reading the configuration without it")
        found = None
    if found is None:
        found = _loaded_here(cli)
    cli.out.table(
        {"plugins": found},
        ["NAME", "IS", "USED", "FROM", "STATE"],
        (
            [
                plugin["name"],
                " ".join(plugin["kinds"]) or "-",
                "yes" if plugin["configured"] else "no",
                plugin["distribution"] or "-",
                plugin["error"] or ("ok" if plugin["configured"] else "not loaded"),
            ]
            for plugin in found
        ),
        empty="no plugin is installed",
    )


def _loaded_here(cli: Cli) -> list[Json]:
    from dispatcher.config.plugins import Plugins
    from dispatcher.config.plugins_used import configured
    from dispatcher.plugin.errors import PluginError

    installed, used = Plugins(), configured(cli.config())
    for name in used:
        if name != "local":
            with contextlib.suppress(PluginError):  # it is remembered
                installed.load(name)
    return [
        {
            "name": name,
            "distribution": installed.available().get(name, ""),
            "kinds": installed.kinds(name) or ([used[name]] if name in used else []),
            "configured": name in used,
            "error": str(installed.refusal(name)) if installed.refusal(name) else None,
        }
        for name in sorted({*installed.available(), *used})
    ]
