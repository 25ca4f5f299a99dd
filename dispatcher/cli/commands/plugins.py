"""plugin list, plugin new, plugin check."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.plugin.errors import ManagerUnreachable

if TYPE_CHECKING:
    from dispatcher.cli.plugin.check import Report
    from dispatcher.cli.plugin.new import Kind
    from dispatcher.client.manager_client import Json

#: What the configuration needs, by kind.
CONFIGURED = {
    "provider": '[apps.APP] with provider = "{name}"',
    "authenticator": '[auth] with authenticator = "{name}"',
    "observer": 'plugins = ["{name}"]',
}


@click.group(
    epilog="\b\nExamples:\n  dispatcher plugin list\n  dispatcher plugin new staff --authenticator\n"
    "  dispatcher plugin check dispatcher-staff"
)
def plugin() -> None:
    """List plugins (providers, authenticators, observers), write a new one, and check one.

    The group can be written `plugins`, too.
    """


@plugin.command(
    "list", short_help="List installed plugins and their faults.", epilog="\b\nExample:\n  dispatcher plugin list"
)
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


@plugin.command(
    short_help="Write a new plugin that works.",
    epilog="\b\nExamples:\n  dispatcher plugin new staff --authenticator\n"
    "  dispatcher plugin new boxes --provider ./boxes",
)
@click.argument("name")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option(
    "--provider", "kind", flag_value="provider", help="Isolates agents; the new one runs plain processes."
)
@click.option(
    "--authenticator", "kind", flag_value="authenticator", help="Checks passwords; the new one has a file."
)
@click.option("--observer", "kind", flag_value="observer", help="Gets events; the new one writes lines of JSON.")
@pass_cli
def new(cli: Cli, name: str, directory: Path | None, kind: Kind | None) -> None:
    """Write a new plugin NAME that works, as a distribution of its own, into DIRECTORY.

    It has a module, tests with the conformance kit, a README and a CI file for GitHub Actions.  DIRECTORY must not
    exist; by default it is dispatcher-NAME.
    """
    if kind is None:
        raise click.UsageError("Say what it is: --provider, --authenticator or --observer")
    from dispatcher.cli.plugin.new import new as write

    target = write(name, kind, directory)
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    cli.out.result(
        {"name": name, "kind": kind, "directory": str(target), "files": files},
        f"wrote {target}: {', '.join(files)}",
    )
    root = "sudo " if kind == "provider" and os.geteuid() != 0 else ""
    cli.out.line("Next:")
    cli.out.line(
        f"  {root}dispatcher plugin check {target}    run its tests in a fresh environment; repeat it as you edit"
    )
    cli.out.line(f"  pip install -e {target}    beside dispatcher, into the same Python environment")
    cli.out.line(f"  {CONFIGURED[kind].format(name=name)}    in the configuration; README.md has an example")


@plugin.command(
    short_help="Run a plugin's tests in a fresh environment.",
    epilog="\b\nExample:\n  dispatcher plugin check dispatcher-staff",
)
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@pass_cli
def check(cli: Cli, directory: Path) -> int:
    """Install the plugin in DIR into a fresh environment, load it and run its tests.

    The environment is a temporary venv that also sees the packages of this program, so the core is the installed
    one.  pip asks a package index only for what is not there.  DIR itself is not changed.  Tests that subclass a
    contract of dispatcher.testing are the judgement: without one the check fails.
    """
    from dispatcher.cli.plugin.check import check as run
    from dispatcher.cli.plugin.check import read

    report = run(read(directory), cli.out.note)
    if cli.out.json:
        cli.out.data(report.to_json())
    else:
        _show(cli, report)
    return int(not report.ok)


def _show(cli: Cli, report: Report) -> None:
    for found in report.plugins:
        cli.out.line(f"{found['name']}: {' and '.join(found['kinds']) or 'nothing'} of {report.distribution}")
    for reason, count in Counter(test["message"] for test in report.tests if test["outcome"] == "skipped").items():
        cli.out.line(f"SKIPPED  {count} tests: {reason}")
    for test in report.tests:
        if test["outcome"] == "failed":
            cli.out.line(f"{test['outcome'].upper()}  {test['test']}")
            for line in test["message"].splitlines()[:12]:
                cli.out.line(f"        {line}")
    for problem in report.problems:
        cli.out.line(f"PROBLEM  {problem}")
    judged = [test["outcome"] == "passed" for test in report.tests if test["contract"]]
    others = [test["outcome"] == "passed" for test in report.tests if not test["contract"]]
    cli.out.line(f"{sum(judged)} of {len(judged)} checks of the kit passed")
    if others:
        cli.out.line(f"{sum(others)} of {len(others)} other tests passed")
