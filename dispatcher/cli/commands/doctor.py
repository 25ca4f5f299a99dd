"""doctor: looks at this machine and installation and says what to do.  Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.config import defaults
from dispatcher.plugin.errors import ConfigError, DispatcherError

if TYPE_CHECKING:
    from dispatcher.config.load import Config
    from dispatcher.plugin.model import Finding


@click.command(epilog="\b\nExamples:\n  dispatcher doctor\n  dispatcher --config new.toml doctor --json")
@json_option
@pass_cli
def doctor(cli: Cli) -> int:
    """Check this machine and this installation; the exit code is 1 when something must be mended."""
    from dispatcher.cli.commands.providers import show_findings

    findings = [
        {"level": finding.level.value, "what": finding.what, "fix": finding.fix} for finding in examine(cli)
    ]
    if cli.out.json:
        cli.out.data({"findings": findings})
    else:
        show_findings(cli.out, findings)
    return int(any(finding["level"] == "error" for finding in findings))


def examine(cli: Cli) -> Iterator[Finding]:
    """Yield what was found, in the order of a person's questions."""
    from dispatcher.cli.checks import machine

    config: Config | None = None
    try:
        config = cli.config()
    except ConfigError as error:
        yield machine.error(str(error), "mend it, then: dispatcher config check")
    used = {app.provider for app in config.apps.values()} | set(config.providers) if config else set()
    yield from machine.python()
    yield from machine.clock()
    yield from machine.open_files()
    yield from machine.bubblewrap()
    yield from machine.user_namespaces()
    yield from machine.private_network()
    yield from machine.cgroups()
    yield from machine.docker(wanted="docker" in used)
    yield from machine.libvirt(wanted="libvirt" in used)
    if config is not None:
        yield from _installation(cli, config)


def _installation(cli: Cli, config: Config) -> Iterator[Finding]:
    from dispatcher.cli.checks import installation, machine, neighbours
    from dispatcher.config.layout import Paths
    from dispatcher.config.plugins import Plugins

    yield from installation.config_file(cli.config_path or defaults.config_file())
    try:
        config.validate_providers(Plugins())
        paths = Paths.of(config)
    except ConfigError as error:
        yield machine.error(str(error), "mend it, then: dispatcher config check")
        return
    serving = False
    try:
        serving, findings = installation.manager(cli.client(), cli.url)
        yield from findings
    except DispatcherError as error:
        yield machine.error(str(error), "check the options")
    yield from installation.directories(paths)
    yield from installation.accounts(config)
    if os.geteuid() == 0:
        yield from neighbours.user_ids(config)
    yield from installation.ports(config, serving=serving)
    yield from installation.encryption(config)
    yield from installation.certificates(config)
