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
    """List plugins (providers, authenticators, observers), write a new one, or check one.

    `dispatcher plugins` does the same.
    """


@plugin.command(
    "list", short_help="List installed plugins and their faults.", epilog="\b\nExample:\n  dispatcher plugin list"
)
@pass_cli
def list_plugins(cli: Cli) -> None:
    """List the installed plugins with their distributions, whether the configuration uses them, and their faults.

    A plugin that the configuration does not use is not imported, so its kind is not known.  If no manager runs on
    this machine, this command loads the configured plugins itself.
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
            "error": str(refusal) if refusal else None,
            "fix": refusal.fix if refusal else "",
        }
        for name in sorted({*installed.available(), *used})
        for refusal in [installed.refusal(name)]
    ]


@plugin.command(
    short_help="Write a new, working plugin.",
    epilog="\b\nExamples:\n  dispatcher plugin new staff --authenticator\n"
    "  dispatcher plugin new boxes --provider ./boxes",
)
@click.argument("name")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option(
    "--provider",
    "kind",
    flag_value="provider",
    help="A provider (isolates agents): it runs them as plain processes.",
)
@click.option(
    "--authenticator",
    "kind",
    flag_value="authenticator",
    help="An authenticator (verifies passwords): it reads users from a file.",
)
@click.option(
    "--observer", "kind", flag_value="observer", help="An observer (gets events): it writes them as lines of JSON."
)
@pass_cli
def new(cli: Cli, name: str, directory: Path | None, kind: Kind | None) -> None:
    """Write a working plugin NAME, which can be installed by pip, into DIRECTORY.

    DIRECTORY gets a module, tests with the conformance kit, a README and a CI file for GitHub Actions.  It must
    not exist; the default is dispatcher-NAME.
    """
    if kind is None:
        raise click.UsageError("Name the kind of plugin: --provider, --authenticator or --observer")
    from dispatcher.cli.plugin.new import new as write

    target = write(name, kind, directory)
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    cli.out.result(
        {"name": name, "kind": kind, "directory": str(target), "files": files},
        f"wrote {target}: {', '.join(files)}",
    )
    root = "sudo " if kind == "provider" and os.geteuid() != 0 else ""
    cli.out.line("Next:")
    cli.out.line(f"  {root}dispatcher plugin check {target}    run its tests; repeat this after each edit")
    cli.out.line(f"  pip install -e {target}    into dispatcher's Python environment")
    cli.out.line(f"  {CONFIGURED[kind].format(name=name)}    in the configuration; README.md has an example")
    cli.out.line("  restart the manager")


@plugin.command(
    short_help="Run a plugin's tests in a fresh environment.",
    epilog="\b\nExamples:\n  dispatcher plugin check dispatcher-staff\n"
    "  dispatcher plugin check --only 'suspend or sleep' dispatcher-boxes",
)
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--only", default="", metavar="WORDS", help="Run only tests whose names match, as pytest's -k.")
@pass_cli
def check(cli: Cli, directory: Path, only: str) -> int:
    """Install the plugin in DIR into a fresh environment, load it and run its tests.

    The environment is a temporary venv that can also import this program's packages, so the tests run against the
    installed dispatcher, and pip uses a package index only for packages that are missing.  DIR is not changed.
    The check fails unless the tests subclass a contract of dispatcher.testing and pass.
    """
    from dispatcher.cli.plugin.check import check as run
    from dispatcher.cli.plugin.check import read

    report = run(read(directory), cli.out.note, only=only)
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
    if report.only:
        cli.out.line("Only a part of the tests ran: check again without --only")
