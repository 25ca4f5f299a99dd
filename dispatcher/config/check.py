"""Checks of a configuration on this host: plugins, apps that could never start, certificates, the access log.

Types and ranges of values are checked by the models in `schema`.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dispatcher.common.contained import PluginRef, bounded, instance
from dispatcher.common.plugin_values import texts
from dispatcher.common.tls import server_context
from dispatcher.config.host_users import proxy_uid
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config, caught
from dispatcher.config.misplaced import PLACEHOLDERS
from dispatcher.config.plugins import Plugins
from dispatcher.plugin.errors import ConfigError, DispatcherError, ProviderError
from dispatcher.plugin.model import App
from dispatcher.plugin.provider import Provider, ProviderContext

_SILENT = logging.getLogger(f"{__name__}.silent")
_SILENT.disabled = True


def faults(config: Config, plugins: Plugins) -> Iterator[str]:
    """Yield every fault of a configuration whose own values are valid, each with its key."""
    yield from caught("manager.run_dir", Paths.of, config)
    yield from tls_faults(config)
    yield from access_log_faults(config)
    yield from config.plugin_problems(plugins)
    yield from app_faults(config, plugins, config.apps)


def app_faults(config: Config, plugins: Plugins, apps: Iterable[str]) -> Iterator[str]:
    """Yield why no agent of these apps could start; what `Config.plugin_problems` yields is left out."""
    made: dict[str, Provider] = {}
    with contextlib.ExitStack() as stack:
        for name in apps:
            try:
                app = config.template(name, plugins)
                if app.provider not in made:
                    made[app.provider] = stack.enter_context(_provider(app.provider, config, plugins))
            except ConfigError:
                continue
            except DispatcherError as error:
                yield f"apps.{name}.provider: {error}"
            else:
                yield from faults_of(app, made[app.provider].faults, plugins.ref("provider", app.provider))


def faults_of(app: App, provider_faults: Callable[[App], Iterable[str]], plugin: PluginRef) -> Iterator[str]:
    """Yield why no agent of an app could start, by its texts and by `Provider.faults`."""
    yield from _misspelt_placeholders(app)
    try:
        found = bounded(plugin, "faults", lambda: texts(provider_faults(app)), log=None, error=ProviderError)
    except DispatcherError as error:
        found = [f"apps.{app.name}.provider: {error}"]
    yield from found


@contextlib.contextmanager
def _provider(name: str, config: Config, plugins: Plugins) -> Iterator[Provider]:
    """Yield a provider as the manager would make it, for questions that need no backend."""
    paths = Paths(config.manager.run_dir.absolute(), config.manager.state_dir.absolute())
    context = ProviderContext(
        installation=secrets.token_hex(4),
        state_dir=paths.provider_state(name),
        run_dir=paths.provider_run(name),
        proxy_gid=os.getegid(),
        privileged=os.geteuid() == 0,
        log=_SILENT,
    )
    options, ref = config.provider_options(name, plugins), plugins.ref("provider", name)
    cls = plugins.provider(name)
    provider = bounded(ref, "__init__", lambda: instance(cls, context=context, options=options), log=None)
    try:
        yield provider
    finally:
        with contextlib.suppress(DispatcherError):
            bounded(ref, "close", provider.close, log=None)


def _misspelt_placeholders(app: App) -> Iterator[str]:
    """Yield the words in braces that are nearly a placeholder; other braces may be the program's own."""
    table = f"apps.{app.name}"
    texts = {f"{table}.environment.{name}": text for name, text in app.environment.items()}
    for key in ("command", "entrypoint"):
        texts[f"{table}.{app.provider}.{key}"] = " ".join(getattr(app.options, key, None) or ())
    for path, text in texts.items():
        for word in re.findall(r"\{(\w+)\}", text):
            near = difflib.get_close_matches(word.lower(), PLACEHOLDERS, 1, 0.7)
            if near and word not in PLACEHOLDERS:
                yield f"{path}: found '{{{word}}}', did you mean '{{{near[0]}}}'?"


def tls_faults(config: Config) -> Iterator[str]:
    """Yield why the certificates of the listeners cannot be used, as far as this user may read them."""
    for table, own, client_ca in (
        ("proxy", config.proxy, None),
        ("manager", config.manager, config.manager.client_ca),
    ):
        if own.tls_cert is None or own.tls_key is None:
            continue
        try:
            server_context(own.tls_cert, own.tls_key, table, client_ca=client_ca)
        except ConfigError as error:
            if not isinstance(error.__cause__, PermissionError):
                yield str(error)


def access_log_faults(config: Config) -> Iterator[str]:
    """Yield why the proxy could not write its access log."""
    if config.proxy.access_log in {"", "-"}:
        return
    path = Path(config.proxy.access_log).absolute()
    if os.path.islink(path):
        yield (
            f"proxy.access_log: {path} is a symbolic link, which the proxy does not follow "
            '(name the file itself, or write "-" for standard output)'
        )
    elif os.path.isdir(path):  # unlike Path's, False where this user may not look
        yield f"proxy.access_log: {path} is a directory, expected the path of a file"
    elif not os.path.isdir(path.parent):
        yield f"proxy.access_log: there is no directory {path.parent}, create it for the user {config.proxy.user}"
    else:
        # A file of the proxy's in a directory of another user is enough for logrotate's copytruncate.
        place = path if os.path.exists(path) else path.parent
        found, uid = place.stat(), proxy_uid(config)
        if uid and found.st_uid != uid and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield (
                f"proxy.access_log: the proxy cannot write to {place}, which belongs to another user "
                f"(run `chown {uid} {place}`, or choose another directory)"
            )
