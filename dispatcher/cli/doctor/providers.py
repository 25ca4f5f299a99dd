"""Checks of `doctor` on plugins: `check` and `explain` of each installed provider, also of a third party, and
whether the authenticator and the observers can be used.

A running manager checks what it uses.  The others are checked in this process, with temporary directories.
"""

from __future__ import annotations

import functools
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dispatcher.common.contained import bounded, instance
from dispatcher.common.plugin_values import finding, several
from dispatcher.config.check import app_faults
from dispatcher.config.plugins_used import configured
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, DispatcherError
from dispatcher.plugin.model import App, Finding, Level
from dispatcher.plugin.provider import Provider, ProviderContext

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.load import Config
    from dispatcher.config.plugins import Plugins

LIMIT = 60.0  # seconds for all plugins together
SECONDS = 30.0  # for one provider
SLACK = 5.0  # seconds that it may take beyond them
_T = TypeVar("_T")
LOCAL = "local"  # the authenticator that is a part of the manager


def plugins_in_use(config: Config, plugins: Plugins, client: ManagerClient | None) -> Iterator[Finding]:
    """Check every installed provider, the authenticator and the observers of the configuration.

    Faults are errors only where the configuration uses the plugin.

    :param client: of the running manager; None without one.
    """
    used = configured(config)
    managed = {state["name"]: state for state in client.plugins()["plugins"]} if client else {}
    backends = {provider["name"] for provider in client.providers()["providers"]} if client else set()

    def findings(name: str) -> list[Finding]:
        kind, state = used.get(name, "provider"), managed.get(name)
        ask: Callable[[], dict[str, Any]] | None = None
        if client is not None and name in backends:
            ask = functools.partial(client.check_provider, name)
        elif client is not None and state and kind == "authenticator" and not state["error"]:
            ask = functools.partial(client.check_authenticator, name)
        if ask is not None:
            return [Finding(**item | {"level": Level(item["level"])}) for item in ask()["findings"]]
        if state and state["configured"]:
            return [_told(state["error"], state.get("fix") or "") if state["error"] else _works(kind)]
        return list(_checked_here(name, kind, config, plugins, used=name in used))

    names = sorted({*backends, *used, *plugins.available()} - {LOCAL})
    for name, result in side_by_side({name: functools.partial(findings, name) for name in names}):
        try:
            found = result()
        except DispatcherError as problem:
            found = [_fault(problem, used=name in used or name in backends)]
        yield from (_of(name, each) for each in found)


def side_by_side(calls: Mapping[str, Callable[[], _T]]) -> Iterator[tuple[str, Callable[[], _T]]]:
    """Make calls about plugins at the same time; yield for each name what returns its result, or raises its error.

    All have `LIMIT` seconds together, so plugins that hang do not add up.
    """
    futures: dict[str, Future[_T]] = {}
    for name, call in calls.items():
        futures[name] = Future()
        threading.Thread(target=_settle, args=(futures[name], call), daemon=True).start()
    deadline = Deadline(LIMIT)
    for name, future in futures.items():
        yield name, functools.partial(_result, name, future, deadline)


def _settle(future: Future[_T], call: Callable[[], _T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def _result(name: str, future: Future[_T], deadline: Deadline) -> _T:
    try:
        return future.result(deadline.remaining())
    except FutureTimeout:
        raise DeadlineExceeded(
            f"It has not answered in {LIMIT:g} seconds", fix=f"dispatcher providers check {name}"
        ) from None


def _works(kind: str) -> Finding:
    return Finding.ok("can be used" if kind == "provider" else f"can be used ({kind})")


def _checked_here(name: str, kind: str, config: Config, plugins: Plugins, *, used: bool) -> Iterator[Finding]:
    """Check a plugin in this process."""
    try:
        plugins.load(name)
        if kind == "authenticator":
            for entry in config.auth.authenticators:
                if entry.partition(".")[0] == name:
                    check_authenticator(entry, config, plugins)
        elif kind == "provider" and (used or "provider" in plugins.kinds(name)):
            yield from check(plugins.provider(name), config, plugins, used=used)
            return
    except DispatcherError as problem:
        yield _fault(problem, used=used)
        return
    if used:
        yield _works(kind)


def check_authenticator(name: str, config: Config, plugins: Plugins) -> None:
    """Make an authenticator and check it.

    :param name: an entry of ``auth.authenticator``.
    :raises DispatcherError: why passwords cannot be checked.
    """
    cls, options = plugins.authenticator(name.partition(".")[0]), config.authenticator_options(name, plugins)
    ref = plugins.ref("authenticator", name)
    made = bounded(ref, "__init__", lambda: instance(cls, options=options), log=None)
    try:
        deadline = Deadline(SECONDS)
        bounded(ref, "check", lambda: made.check(deadline=deadline), seconds=SECONDS + SLACK, log=None)
    finally:
        bounded(ref, "close", made.close, log=None)


def check(
    cls: type[Provider], config: Config, plugins: Plugins, *, used: bool, app: App | None = None
) -> Iterator[Finding]:
    """Check a provider in this process, and explain it if the configuration uses it: for an app, or as a whole."""
    ref = plugins.ref("provider", cls.name)
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

        def ask() -> list[Finding]:
            provider = instance(cls, context=context, options=options)
            try:
                provider.check(deadline=Deadline(SECONDS))
                return several(provider.explain(app), finding) if used else []
            finally:
                provider.close()

        try:
            options = config.provider_options(cls.name, plugins)
            explained = bounded(ref, "its check", ask, seconds=SECONDS + SLACK, log=None)
            if app is not None:
                explained += map(Finding.error, app_faults(config, plugins, [app.name]))
        except DispatcherError as problem:
            yield _fault(problem, used=used)
        else:
            yield Finding.ok("can be used")
            yield from explained


def _told(error: str, fix: str) -> Finding:
    """Return what the manager tells of a plugin; without a fix its log has more."""
    return Finding.error(error.removesuffix(f" ({fix})"), fix or "see the manager's log")


def _fault(problem: DispatcherError, *, used: bool) -> Finding:
    what = f"{problem.what}: {problem.why}" if problem.why else problem.what
    return (
        Finding.error(what, problem.fix)
        if used
        else Finding.info(f"{what} (not used by the configuration)", problem.fix)
    )


def _of(name: str, finding: Finding) -> Finding:
    return Finding(level=finding.level, what=f"{name}: {finding.what}", fix=finding.fix)
