"""A provider, contained: its exceptions are translated, its results are checked.

A plugin may have any fault.  Each ends here as an error of dispatcher's tree that names the provider and the call,
and affects only the agent that the call was for.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Concatenate, ParamSpec, TypeVar

from dispatcher.common import plugin_values
from dispatcher.common.contained import PluginRef, contained, text
from dispatcher.common.plain import plain
from dispatcher.manager.backends.pool import current_job
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, DispatcherError, ProviderError
from dispatcher.plugin.log_files import MAX_LINE
from dispatcher.plugin.model import (
    AgentSpec,
    App,
    Capability,
    Finding,
    Handle,
    Observation,
    Usage,
)
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import Closeable, Progress, Provider

MAX_LISTED = 100_000
HANDLE_TIME = 5.0  # seconds
USUAL_TIME = 30.0  # seconds for a call that has no deadline of its own

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _forward(method: Callable[Concatenate[Provider, _P], _T]) -> Callable[Concatenate[ContainedProvider, _P], _T]:
    """Return the contained form of a method of `Provider` whose result needs no check."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: ContainedProvider, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        deadline = kwargs.get("deadline")
        with self._call(name, deadline if isinstance(deadline, Deadline) else Deadline(USUAL_TIME)):
            result: _T = getattr(self.wrapped, name)(*args, **kwargs)
            return result

    return call


class ContainedProvider:
    """The methods of `Provider` that the manager calls.  Raises nothing but `DispatcherError`."""

    def __init__(self, wrapped: Provider, plugin: PluginRef) -> None:
        self.wrapped = wrapped
        self.plugin = plugin
        self.name = plugin.name
        self.isolation = type(wrapped).isolation  # checked when the class was loaded

    check = _forward(Provider.check)
    stop = _forward(Provider.stop)
    destroy = _forward(Provider.destroy)
    suspend = _forward(Provider.suspend)
    resume = _forward(Provider.resume)
    export_data = _forward(Provider.export_data)
    import_data = _forward(Provider.import_data)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The declared capabilities."""
        with self._call("capabilities", Deadline(USUAL_TIME)), self._valid("capabilities"):
            return plugin_values.capabilities(self.wrapped.capabilities)

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        """`Provider.prepare`"""
        with self._call("prepare", deadline):
            self.wrapped.prepare(_copy_of_app(app), deadline=deadline, progress=progress)

    def explain(self, app: App | None) -> list[Finding]:
        """`Provider.explain`"""
        with self._call("explain", Deadline(USUAL_TIME)):
            found = self.wrapped.explain(app and _copy_of_app(app))
            with self._valid("explain", found):
                return plugin_values.several(found, plugin_values.finding)

    def faults(self, app: App) -> list[str]:
        """`Provider.faults`"""
        with self._call("faults", Deadline(USUAL_TIME)):
            found = self.wrapped.faults(_copy_of_app(app))
            with self._valid("faults", found):
                return plugin_values.texts(found)

    def handle(self, spec: AgentSpec) -> Handle:
        """`Provider.handle`"""
        with self._call("handle", Deadline(HANDLE_TIME)):
            return self._own(spec, self.wrapped.handle(_copy_of_spec(spec)), "handle")

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        """`Provider.watch`; events that are no names are dropped."""

        def changed(name: object) -> None:
            if isinstance(name, str) and len(name) <= plugin_values.MAX_NAME:
                on_change(plain(name))

        with self._call("watch", Deadline(USUAL_TIME)):
            watch = self.wrapped.watch(changed)
            if not callable(getattr(watch, "close", None)):
                raise self._invalid("watch", f"{printable(watch)} has no close()")
            return watch

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        """`Provider.ensure`"""
        with self._call("ensure", deadline):
            found = self.wrapped.ensure(_copy_of_spec(spec), deadline=deadline, progress=progress)
            return self._own(spec, found, "ensure")

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        """`Provider.observe`"""
        with self._call("observe", deadline):
            found = self.wrapped.observe(handle, deadline=deadline)
            with self._valid("observe", found):
                return plugin_values.observation(found)

    def listeners(self, handle: Handle, *, deadline: Deadline) -> list[str]:
        """`Provider.listeners`"""
        with self._call("listeners", deadline):
            found = self.wrapped.listeners(handle, deadline=deadline)
            with self._valid("listeners", found):
                return plugin_values.texts(found)

    def list(self, *, deadline: Deadline) -> list[tuple[Handle, Observation]]:
        """`Provider.list`, collected."""
        found: list[tuple[Handle, Observation]] = []
        with self._call("list", deadline):
            items = self.wrapped.list(deadline=deadline)
            with self._valid("list", items):
                rest = iter(items)
            for item in rest:
                with self._valid("list", item):
                    handle, seen = item
                    handle, seen = plugin_values.handle(handle), plugin_values.observation(seen)
                    if handle.provider != self.name:
                        raise ValueError(f"a handle of the provider {printable(handle.provider)}")
                found.append((handle, seen))
                if len(found) > MAX_LISTED or deadline.expired:
                    raise DeadlineExceeded(
                        f"The {self.plugin} did not finish its list in time",
                        why=f"{len(found)} agents were listed",
                        fix=self.plugin.report,
                    )
        return found

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        """`Provider.logs`, a line at a time, until the deadline; without `follow` as many as were asked for."""
        with self._call("logs", deadline):
            found = self.wrapped.logs(handle, tail=tail, follow=follow, deadline=deadline)
            with self._valid("logs", found):
                lines = iter(found)
        for number in itertools.count(1):
            with self._call("logs", deadline):
                line = next(lines, None)
                if line is None:
                    return
                if not isinstance(line, bytes):
                    raise self._invalid("logs", f"a line is {printable(line)}, expected bytes")
                if number > tail and not follow:
                    raise self._invalid("logs", f"more than the {tail} lines that were asked for")
            yield plain(line)[:MAX_LINE]  # outside: the reader may end here
            if deadline.expired:
                return

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> dict[str, Usage]:
        """`Provider.usage`"""
        with self._call("usage", deadline):
            found = self.wrapped.usage(handles, deadline=deadline)
            with self._valid("usage", found):
                wanted = {handle.name for handle in handles}
                return {
                    name: plugin_values.usage(value)
                    for name, value in plain(dict(found)).items()
                    if name in wanted
                }

    def close(self) -> None:
        """`Provider.close`; exceptions are logged."""
        with suppress(DispatcherError), contained(self.plugin, "close"):
            self.wrapped.close()

    @contextmanager
    def _call(self, method: str, deadline: Deadline) -> Iterator[None]:
        job = current_job()
        with contained(self.plugin, method):
            if job is None:
                yield
            else:
                with job.calling(self.plugin, method, deadline):
                    yield

    @contextmanager
    def _valid(self, method: str, value: object = None) -> Iterator[None]:
        """Name the method whose value the block finds to be wrong."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise self._invalid(method, str(error) or printable(value)) from error

    def _own(self, spec: AgentSpec, value: object, method: str) -> Handle:
        with self._valid(method, value):
            handle = plugin_values.handle(value)
            if handle.provider != self.name or handle.agent != spec.agent:
                raise ValueError(
                    f"it is of {printable(handle.agent)} and the provider {printable(handle.provider)}"
                )
        return handle

    def _invalid(self, method: str, why: str) -> ProviderError:
        return ProviderError(
            f"The {self.plugin} returned an invalid value from {method}",
            why=text(why, 500),
            fix=self.plugin.report,
        )


def _copy_of_app(app: App) -> App:
    """Return an app that a provider may change without effect on others."""
    made = copy.copy(app)
    object.__setattr__(made, "environment", dict(app.environment))
    object.__setattr__(made, "options", app.options.model_copy(deep=True))
    return made


def _copy_of_spec(spec: AgentSpec) -> AgentSpec:
    return replace(spec, app=_copy_of_app(spec.app), secrets=dict(spec.secrets))
