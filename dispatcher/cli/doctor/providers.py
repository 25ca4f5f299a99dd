"""Checks of `doctor` on providers: `check` and `explain` of each installed one, also of a third party.

A running manager checks the providers that it uses.  The others are checked in this process, with temporary
directories.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.common.contained import contained
from dispatcher.config.check import app_faults
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, PluginError
from dispatcher.plugin.model import App, Finding, Level
from dispatcher.plugin.provider import Provider, ProviderContext

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.load import Config
    from dispatcher.config.plugins import Plugins

SECONDS = 30.0  # for one provider


def providers(config: Config, plugins: Plugins, client: ManagerClient | None) -> Iterator[Finding]:
    """Check every installed provider; faults are errors only where the configuration uses it.

    :param client: of the running manager; None without one.
    """
    managed = {provider["name"] for provider in client.providers()["providers"]} if client else set()
    for name in sorted(managed):
        assert client is not None
        for item in client.check_provider(name)["findings"]:
            yield _of(name, Finding(level=Level(item["level"]), what=item["what"], fix=item["fix"]))
    used = set(config.providers) | {app.provider for app in config.apps.values()}
    for name in sorted((used | set(plugins.available())) - managed):
        try:
            plugins.load(name)
        except PluginError as problem:
            yield _fault(problem, used=name in used)
            continue
        try:
            provider = plugins.provider(name)
        except PluginError as problem:
            if name in used:
                yield _fault(problem, used=True)
            continue  # a plugin may register something other than a provider
        for finding in check(provider, config, plugins, used=name in used):
            yield _of(name, finding)


def check(
    cls: type[Provider], config: Config, plugins: Plugins, *, used: bool, app: App | None = None
) -> Iterator[Finding]:
    """Check a provider in this process, and explain it if the configuration uses it: for an app, or as a whole."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-doctor-") as directory:
        home = Path(directory)
        for place in ("state", "run"):
            (home / place).mkdir()
        context = ProviderContext(
            installation=secrets.token_hex(4),
            state_dir=home / "state",
            run_dir=home / "run",
            proxy_gid=os.getegid(),
            privileged=os.geteuid() == 0,
        )
        try:
            with contained(f"provider {cls.name}", "its check", log=None):
                provider = cls(context=context, options=config.provider_options(cls.name, plugins))
                try:
                    provider.check(deadline=Deadline(SECONDS))
                    explained = list(provider.explain(app)) if used else []
                    if app is not None:
                        explained += map(Finding.error, app_faults(config, plugins, [app.name]))
                finally:
                    provider.close()
        except DispatcherError as problem:
            yield _fault(problem, used=used)
        else:
            yield Finding.ok("can be used")
            yield from explained


def _fault(problem: DispatcherError, *, used: bool) -> Finding:
    what = f"{problem.what}: {problem.why}" if problem.why else problem.what
    return (
        Finding.error(what, problem.fix)
        if used
        else Finding.info(f"{what} (not used by the configuration)", problem.fix)
    )


def _of(name: str, finding: Finding) -> Finding:
    return Finding(level=finding.level, what=f"{name}: {finding.what}", fix=finding.fix)
