"""providers list, providers check, providers schema."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.cli.ui.output import Output
from dispatcher.plugin.errors import ManagerUnreachable

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json

MARKS = {"ok": "ok", "info": "note", "warning": "WARNING", "error": "ERROR"}


@click.group(epilog="\b\nExamples:\n  dispatcher providers check subprocess\n  dispatcher providers schema docker")
def providers() -> None:
    """List, check and describe providers."""


@providers.command("list", epilog="\b\nExample:\n  dispatcher providers list")
@pass_cli
def list_providers(cli: Cli) -> None:
    """List the providers that the manager uses: isolation, usability and capabilities."""
    client = cli.client()
    found = client.providers()
    others = [
        f"{plugin['name']} ({plugin['distribution']})"
        for plugin in client.plugins()["plugins"]
        if not plugin["configured"]
    ]
    cli.out.table(
        found,
        ["NAME", "ISOLATION", "USABLE", "FROM", "CAN"],
        (
            [
                provider["name"],
                provider["isolation"],
                "yes" if provider["usable"] else f"no: {_error(provider)}",
                provider["distribution"],
                " ".join(provider["capabilities"]),
            ]
            for provider in found["providers"]
        ),
        empty="no provider is configured",
        least=("FROM",),
    )
    if others:
        cli.out.note(f"installed, not used by the configuration: {', '.join(others)}")


def _error(provider: Json) -> str:
    error = provider.get("error")
    return str(error.get("what", "")) if isinstance(error, dict) else str(error or "")


@providers.command(
    epilog="\b\nExamples:\n  dispatcher providers check\n  dispatcher providers check docker --app notebook"
)
@click.argument("name", required=False)
@click.option("--app", metavar="APP", help="For this app rather than for the backend as a whole.")
@pass_cli
def check(cli: Cli, name: str | None, app: str | None) -> int:
    """Check the provider NAME (or all), and explain what it isolates and what it does not.

    If no manager runs on this machine, this command makes the checks itself.
    """
    if app is not None and name is None:
        raise click.UsageError("--app needs the NAME of its provider")
    from dispatcher.cli.doctor.providers import side_by_side

    client, answers = cli.client(), None
    try:
        chosen = [name] if name else [provider["name"] for provider in client.providers()["providers"]]
        checks = {provider: functools.partial(client.check_provider, provider, app) for provider in chosen}
        answers = {provider: result()["findings"] for provider, result in side_by_side(checks)}
    except ManagerUnreachable as error:
        if not cli.url.startswith("unix:"):
            raise
        cli.out.note(f"{error.what}: {error.why}; checking without it")
    if answers is None:  # not while that error is handled: it would count as the cause of the next one
        answers = _checked_here(cli, name, app)
    bad = any(finding["level"] == "error" for findings in answers.values() for finding in findings)
    if cli.out.json:
        cli.out.data(answers)
        return int(bad)
    for provider, findings in answers.items():
        if len(answers) > 1:
            cli.out.line(f"{provider}:")
        show_findings(cli.out, findings)
    return int(bad)


def _checked_here(cli: Cli, name: str | None, app: str | None) -> dict[str, list[Json]]:
    """Return the findings about providers of the configuration, in the form of the REST interface."""
    from dispatcher.cli.doctor.providers import check, side_by_side
    from dispatcher.config.plugins import Plugins

    config, plugins = cli.config(), Plugins()
    template = config.template(app, plugins) if app else None
    chosen = [name] if name else sorted(set(config.providers) | {each.provider for each in config.apps.values()})

    def findings(provider: str) -> list[Json]:
        found = check(plugins.provider(provider), config, plugins, used=True, app=template)
        return [{"level": each.level.value, "what": each.what, "fix": each.fix} for each in found]

    checks = {provider: functools.partial(findings, provider) for provider in chosen}
    return {provider: result() for provider, result in side_by_side(checks)}


def show_findings(out: Output, findings: list[Json]) -> None:
    """Print findings, each with its level and what to do."""
    width = max(map(len, MARKS.values()))
    for finding in findings:
        mark = MARKS.get(finding["level"], str(finding["level"]))
        out.line(f"{mark.ljust(width)}  {finding['what']}")
        if finding.get("fix"):
            out.line(f"{' ' * width}  -> {finding['fix']}")


@providers.command(epilog="\b\nExample:\n  dispatcher providers schema subprocess")
@click.argument("name")
@pass_cli
def schema(cli: Cli, name: str) -> None:
    """Print the JSON Schema of the options of the provider NAME: [providers.NAME] and [apps.APP.NAME]."""
    from dispatcher.config.plugins import Plugins

    provider = Plugins().provider(name)
    cli.out.data(
        {
            f"providers.{name}": provider.Options.model_json_schema(),
            f"apps.APP.{name}": provider.AppOptions.model_json_schema(),
        }
    )
