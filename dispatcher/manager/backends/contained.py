"""A provider, contained: its exceptions are translated, its results are checked.

A plugin may have any fault.  Each ends here as an error of dispatcher's tree that names the provider and the call,
and affects only the agent that the call was for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dispatcher.manager.backends.pool import current_job
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, DispatcherError, ProviderError
from dispatcher.plugin.model import (
    AgentSpec,
    App,
    BackendState,
    Capability,
    Depth,
    Endpoint,
    Finding,
    Handle,
    Isolation,
    Observation,
    Usage,
)
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import Closeable, Progress, Provider

MAX_LISTED = 1_000_000
MAX_LINE = 65536  # bytes of one log line

_T = TypeVar("_T")
_log = logging.getLogger("dispatcher.manager")


class ContainedProvider:
    """The methods of `Provider` that the manager calls.  Raises nothing but `DispatcherError`."""

    def __init__(self, wrapped: Provider) -> None:
        self.wrapped = wrapped
        self.name = wrapped.name

    @property
    def isolation(self) -> Isolation:
        """`Provider.isolation`"""
        return self.wrapped.isolation

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The declared capabilities; none after an exception."""
        try:
            return frozenset(Capability(item) for item in self.wrapped.capabilities)
        except Exception:
            _log.exception("The provider %s failed in capabilities", self.name)
            return frozenset()

    def check(self, *, deadline: Deadline) -> None:
        """`Provider.check`"""
        with self._call("check", deadline):
            self.wrapped.check(deadline=deadline)

    def explain(self, app: App | None) -> list[Finding]:
        """`Provider.explain`"""
        with self._call("explain", Deadline(30)):
            return [self._checked("explain", item, Finding) for item in self.wrapped.explain(app)]

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        """`Provider.prepare`"""
        with self._call("prepare", deadline):
            self.wrapped.prepare(app, deadline=deadline, progress=progress)

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

    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        """`Provider.stop`"""
        with self._call("stop", deadline):
            self.wrapped.stop(handle, grace=grace, deadline=deadline, progress=progress)

    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        """`Provider.destroy`"""
        with self._call("destroy", deadline):
            self.wrapped.destroy(handle, data=data, deadline=deadline, progress=progress)

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        """`Provider.suspend`"""
        with self._call("suspend", deadline):
            self.wrapped.suspend(handle, depth=depth, deadline=deadline, progress=progress)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        """`Provider.resume`"""
        with self._call("resume", deadline):
            self.wrapped.resume(handle, deadline=deadline, progress=progress)

    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        """`Provider.export_data`"""
        with self._call("export_data", deadline):
            self.wrapped.export_data(handle, directory, deadline=deadline, progress=progress)

    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        """`Provider.import_data`"""
        with self._call("import_data", deadline):
            self.wrapped.import_data(handle, directory, deadline=deadline, progress=progress)

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
            for line in self.wrapped.logs(handle, tail=tail, follow=follow, deadline=deadline):
                yield self._checked("logs", line, bytes)[:MAX_LINE]

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> dict[str, Usage]:
        """`Provider.usage`"""
        with self._call("usage", deadline):
            found = self.wrapped.usage(handles, deadline=deadline)
            if not isinstance(found, Mapping):
                raise self._invalid("usage", found)
            return {str(name): self._checked("usage", usage, Usage) for name, usage in found.items()}

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        """`Provider.watch`"""
        with self._call("watch", Deadline(30)):
            return self.wrapped.watch(on_change)

    def close(self) -> None:
        """`Provider.close`; exceptions are logged."""
        try:
            self.wrapped.close()
        except Exception:
            _log.exception("The provider %s cannot be closed", self.name)

    @contextmanager
    def _call(self, method: str, deadline: Deadline) -> Iterator[None]:
        job = current_job()
        try:
            if job is None:
                yield
            else:
                with job.calling(f"{self.name}.{method}", deadline):
                    yield
        except (DispatcherError, GeneratorExit):
            raise
        except BaseException as error:  # also SystemExit and KeyboardInterrupt that a plugin raises
            _log.exception("The provider %s failed in %s", self.name, method)
            raise ProviderError(
                f"The provider {self.name} failed in {method}",
                why=f"{type(error).__name__}: {printable(str(error), 300)}",
                fix="report this fault to the author of the plugin; the manager's log has the details",
            ) from error

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
            fix="report this fault to the author of the plugin",
        )
