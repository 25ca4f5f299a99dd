"""A provider, contained: its exceptions are translated, its results are checked.

A plugin may have any fault.  Each ends here as an error of dispatcher's tree that names the provider and the call,
and affects only the agent that the call was for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from dispatcher.common.contained import REPORT, contained
from dispatcher.manager.backends.pool import current_job
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, DispatcherError, ProviderError
from dispatcher.plugin.log_files import MAX_LINE
from dispatcher.plugin.model import (
    AgentSpec,
    App,
    BackendState,
    Capability,
    Endpoint,
    Finding,
    Handle,
    Observation,
    Usage,
)
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import Progress, Provider

MAX_LISTED = 1_000_000
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

    def __init__(self, wrapped: Provider) -> None:
        self.wrapped = wrapped
        self.name = wrapped.name
        self.isolation = wrapped.isolation

    check = _forward(Provider.check)
    prepare = _forward(Provider.prepare)
    stop = _forward(Provider.stop)
    destroy = _forward(Provider.destroy)
    suspend = _forward(Provider.suspend)
    resume = _forward(Provider.resume)
    export_data = _forward(Provider.export_data)
    import_data = _forward(Provider.import_data)
    watch = _forward(Provider.watch)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The declared capabilities; none after an exception."""
        with suppress(DispatcherError), contained(f"provider {self.name}", "capabilities"):
            return frozenset(Capability(item) for item in self.wrapped.capabilities)
        return frozenset()

    def explain(self, app: App | None) -> list[Finding]:
        """`Provider.explain`"""
        with self._call("explain", Deadline(USUAL_TIME)):
            return [self._checked("explain", item, Finding) for item in self.wrapped.explain(app)]

    def faults(self, app: App) -> list[str]:
        """`Provider.faults`"""
        with self._call("faults", Deadline(USUAL_TIME)):
            return [self._checked("faults", item, str) for item in self.wrapped.faults(app)]

    def handle(self, spec: AgentSpec) -> Handle:
        """`Provider.handle`"""
        with self._call("handle", Deadline(5)):
            return self._own(spec, self.wrapped.handle(spec), "handle")

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        """`Provider.ensure`"""
        with self._call("ensure", deadline):
            return self._own(spec, self.wrapped.ensure(spec, deadline=deadline, progress=progress), "ensure")

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        """`Provider.observe`"""
        with self._call("observe", deadline):
            return self._observation("observe", self.wrapped.observe(handle, deadline=deadline))

    def listeners(self, handle: Handle, *, deadline: Deadline) -> list[str]:
        """`Provider.listeners`"""
        with self._call("listeners", deadline):
            found = self.wrapped.listeners(handle, deadline=deadline)
            return [self._checked("listeners", address, str) for address in found]

    def list(self, *, deadline: Deadline) -> list[tuple[Handle, Observation]]:
        """`Provider.list`, collected."""
        found: list[tuple[Handle, Observation]] = []
        with self._call("list", deadline):
            for item in self.wrapped.list(deadline=deadline):
                if not (isinstance(item, tuple) and len(item) == 2):
                    raise self._invalid("list", item)
                handle = self._checked("list", item[0], Handle)
                if handle.provider != self.name:
                    raise self._invalid("list", handle)
                found.append((handle, self._observation("list", item[1])))
                if len(found) > MAX_LISTED or deadline.expired:
                    raise DeadlineExceeded(f"The provider {self.name} did not finish its list in time")
        return found

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        """`Provider.logs`, a line at a time."""
        with self._call("logs", deadline):
            lines = iter(self.wrapped.logs(handle, tail=tail, follow=follow, deadline=deadline))
        while True:
            with self._call("logs", deadline):
                line = next(lines, None)
                if line is None:
                    return
                self._checked("logs", line, bytes)
            yield line[:MAX_LINE]  # outside: the reader may end here

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> dict[str, Usage]:
        """`Provider.usage`"""
        with self._call("usage", deadline):
            found = self._checked("usage", dict(self.wrapped.usage(handles, deadline=deadline)), dict)
            return {str(name): self._checked("usage", usage, Usage) for name, usage in found.items()}

    def close(self) -> None:
        """`Provider.close`; exceptions are logged."""
        with suppress(DispatcherError), contained(f"provider {self.name}", "close"):
            self.wrapped.close()

    @contextmanager
    def _call(self, method: str, deadline: Deadline) -> Iterator[None]:
        job = current_job()
        with contained(f"provider {self.name}", method):
            if job is None:
                yield
            else:
                with job.calling(f"{self.name}.{method}", deadline):
                    yield

    def _own(self, spec: AgentSpec, value: object, method: str) -> Handle:
        handle = self._checked(method, value, Handle)
        if handle.provider != self.name or handle.agent != spec.agent:
            raise self._invalid(method, handle)
        handle.to_json()  # raises unless it is JSON
        return handle

    def _observation(self, method: str, value: object) -> Observation:
        seen = self._checked(method, value, Observation)
        if not (
            isinstance(seen.state, BackendState)
            and isinstance(seen.endpoint, (Endpoint, type(None)))
            and isinstance(seen.owner_uid, (int, type(None)))
            and isinstance(seen.started_at, (int, float, type(None)))
            and isinstance(seen.spec_hash, str)
            and isinstance(seen.exit_reason, str)
            and isinstance(seen.oom_kills, int)
        ):
            raise self._invalid(method, seen)
        return seen

    def _checked(self, method: str, value: Any, kind: type[_T]) -> _T:
        if not isinstance(value, kind):
            raise self._invalid(method, value)
        return value

    def _invalid(self, method: str, value: object) -> ProviderError:
        return ProviderError(
            f"The provider {self.name} returned an invalid value from {method}",
            why=f"it returned {printable(value, 200)}",
            fix=REPORT,
        )
