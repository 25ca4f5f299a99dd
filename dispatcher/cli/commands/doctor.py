"""doctor: check the machine, the providers and the installation, and say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.config import default_paths
from dispatcher.plugin.errors import ConfigError, DispatcherError
from dispatcher.plugin.model import Finding


@click.command(epilog="\b\nExamples:\n  dispatcher doctor\n  dispatcher --config new.toml doctor --json")
@pass_cli
def doctor(cli: Cli) -> int:
    """Check this machine, the providers and the installation.  The exit code is 1 if there is an error."""
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
    """Yield all findings: machine, configuration, manager, providers, then the rest of the installation."""
    from dispatcher.cli.doctor import installation, machine
    from dispatcher.cli.doctor.providers import plugins_in_use
    from dispatcher.config.check import access_log_faults, tls_faults
    from dispatcher.config.layout import Paths
    from dispatcher.config.load import Config
    from dispatcher.config.plugins import Plugins
    from dispatcher.config.plugins_used import configured

    yield from machine.clock()
    yield from machine.open_files()
    yield from machine.file_table()
    if os.geteuid() != 0 and default_paths.SYSTEM_CONFIG.exists() and cli.config_path is None:
        yield Finding.info(
            f"{default_paths.SYSTEM_CONFIG} configures the installation of this host; this checks one of your own",
            "sudo dispatcher doctor",
        )
    plugins = Plugins()
    config, paths = Config(), None
    try:
        config = cli.config()
        yield from installation.config_file(cli.config_path or default_paths.config_file())
        plugins.load_all(configured(config))
        config.validate_providers(plugins)
        paths = Paths.of(config)
    except ConfigError as problem:
        yield Finding.error(str(problem), "correct it, then: dispatcher config check")
    client = None
    try:
        serving, findings = installation.manager(cli.client(), cli.url)
        client = cli.client() if serving else None
        yield from findings
        yield from plugins_in_use(config, plugins, client)
    except DispatcherError as problem:
        yield Finding.error(str(problem), "check the options, and the manager's log")
    if paths is None:
        return
    yield installation.edge_modules()
    yield from installation.directories(paths)
    yield from installation.accounts(config)
    yield from installation.ports(config, serving=client is not None)
    yield from installation.encryption(config)
    yield from installation.certificates(config)
    yield from installation.served_certificate(config)
    yield from map(Finding.error, (*tls_faults(config), *access_log_faults(config)))
    yield from map(Finding.warning, installation.renewal_faults(config))
