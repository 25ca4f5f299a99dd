"""Calling a provider with suspicion.  Touches nothing but the provider that it is given.

`Driver` has the provider's methods with deadlines filled in.  Each call is judged: only errors of the
project's tree may come out, in time, and what is returned has the promised type.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, DispatcherError
from dispatcher.plugin.model import (
    AgentSpec,
    App,
    BackendState,
    Capability,
    Depth,
    Endpoint,
    Handle,
    Observation,
    Usage,
)
from dispatcher.plugin.provider import Closeable, Progress, Provider, no_progress

_T = TypeVar("_T")


def expect(condition: object, advice: str) -> None:
    """Fail the check with `advice` for the provider's author unless `condition` holds."""
    __tracebackhide__ = True
    if not condition:
        pytest.fail(advice)


class Driver:
    """A provider under test.

    :param provider: the real one; :param patience: seconds that a long call may take; :param slack: seconds
        that a call may take past its deadline.
    """

    def __init__(self, provider: Provider, *, patience: float, slack: float) -> None:
        self.provider = provider
        self.patience = patience
        self.slack = slack

    @property
    def name(self) -> str:
        """The provider's name."""
        return self.provider.name

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the provider declares."""
        return self.provider.capabilities

    def can(self, capability: Capability) -> bool:
        """Whether the provider declares `capability`."""
        return capability in self.provider.capabilities

    def check(self, *, seconds: float | None = None) -> None:
        """`Provider.check`."""
        self._call("check", lambda by: self.provider.check(deadline=by), seconds)

    def prepare(self, app: App, *, seconds: float | None = None, progress: Progress = no_progress) -> None:
        """`Provider.prepare`."""
        self._call("prepare", lambda by: self.provider.prepare(app, deadline=by, progress=progress), seconds)

    def handle(self, spec: AgentSpec) -> Handle:
        """`Provider.handle`."""
        handle = self._call("handle", lambda _: self.provider.handle(spec), 1.0)
        return self._handle("handle", handle)

    def ensure(self, spec: AgentSpec, *, seconds: float | None = None, progress: Progress = no_progress) -> Handle:
        """`Provider.ensure`."""
        handle = self._call(
            "ensure", lambda by: self.provider.ensure(spec, deadline=by, progress=progress), seconds
        )
        return self._handle("ensure", handle)

    def ensure_doomed(self, spec: AgentSpec) -> Handle:
        """Start an app that ends at once: `ensure` returns, or raises `ProviderError`."""
        handle = self.handle(spec)
        try:
            self.ensure(spec)
        except DispatcherError as error:
            expect(
                error.code in {"provider-error", "start-failed"},
                f"ensure() raised {error.code}: raise ProviderError",
            )
        return handle

    def observe(self, handle: Handle, *, seconds: float | None = None) -> Observation:
        """`Provider.observe`."""
        seen = self._call("observe", lambda by: self.provider.observe(handle, deadline=by), seconds)
        return self._observation("observe", seen)

    def state(self, handle: Handle) -> BackendState:
        """The state that `observe` tells."""
        return self.observe(handle).state

    def stop(
        self,
        handle: Handle,
        *,
        grace: float = 0.2,
        seconds: float | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """`Provider.stop`."""
        self._call(
            "stop",
            lambda by: self.provider.stop(handle, grace=grace, deadline=by, progress=progress),
            seconds,
        )

    def destroy(
        self,
        handle: Handle,
        *,
        data: bool = True,
        seconds: float | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """`Provider.destroy`."""
        self._call(
            "destroy",
            lambda by: self.provider.destroy(handle, data=data, deadline=by, progress=progress),
            seconds,
        )

    def list(self, *, seconds: float | None = None) -> dict[str, tuple[Handle, Observation]]:
        """`Provider.list`, by agent."""
        found = self._call("list", lambda by: list(self.provider.list(deadline=by)), seconds)
        agents: dict[str, tuple[Handle, Observation]] = {}
        for item in found:
            expect(
                isinstance(item, tuple) and len(item) == 2,
                f"list() must yield pairs of Handle and Observation, not {item!r}",
            )
            handle, seen = item
            self._handle("list", handle)
            self._observation("list", seen)
            expect(handle.agent not in agents, f"list() yields the agent {handle.agent!r} twice; yield it once")
            agents[handle.agent] = (handle, seen)
        return agents

    def suspend(
        self,
        handle: Handle,
        *,
        depth: Depth = Depth.RAM,
        seconds: float | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """`Provider.suspend`."""
        self._call(
            "suspend",
            lambda by: self.provider.suspend(handle, depth=depth, deadline=by, progress=progress),
            seconds,
        )

    def resume(self, handle: Handle, *, seconds: float | None = None, progress: Progress = no_progress) -> None:
        """`Provider.resume`."""
        self._call("resume", lambda by: self.provider.resume(handle, deadline=by, progress=progress), seconds)

    def logs(
        self, handle: Handle, *, tail: int = 100, follow: bool = False, seconds: float | None = None
    ) -> Sequence[bytes]:
        """`Provider.logs`, read to its end."""

        def read(by: Deadline) -> Sequence[bytes]:
            return [*self.provider.logs(handle, tail=tail, follow=follow, deadline=by)]

        lines = self._call("logs", read, seconds)
        for line in lines:
            expect(isinstance(line, bytes), f"logs() must yield bytes, not {type(line).__name__}")
            expect(not line.endswith(b"\n"), "logs() must yield lines without their end: strip the newline")
        return lines

    def usage(self, handles: Sequence[Handle], *, seconds: float | None = None) -> Mapping[str, Usage]:
        """`Provider.usage`."""
        found = self._call("usage", lambda by: self.provider.usage(handles, deadline=by), seconds)
        known = {handle.name for handle in handles}
        for name, usage in found.items():
            expect(
                name in known and isinstance(usage, Usage),
                f"usage() must map Handle.name to Usage, not {name!r} to {usage!r}",
            )
        return found

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        """`Provider.watch`."""
        return self._call("watch", lambda _: self.provider.watch(on_change), None)

    def export_data(self, handle: Handle, directory: Path, *, seconds: float | None = None) -> None:
        """`Provider.export_data`."""
        self._call(
            "export_data",
            lambda by: self.provider.export_data(handle, directory, deadline=by, progress=no_progress),
            seconds,
        )

    def import_data(self, handle: Handle, directory: Path, *, seconds: float | None = None) -> None:
        """`Provider.import_data`."""
        self._call(
            "import_data",
            lambda by: self.provider.import_data(handle, directory, deadline=by, progress=no_progress),
            seconds,
        )

    def _call(self, method: str, call: Callable[[Deadline], _T], seconds: float | None) -> _T:
        __tracebackhide__ = True
        allowed = self.patience if seconds is None else seconds
        began = time.monotonic()
        try:
            return call(Deadline(allowed))
        except DispatcherError as error:
            expect(
                error.what.strip(),
                f"{method}() raised {type(error).__name__} without a word: say what happened, why, and what to do",
            )
            raise
        except pytest.fail.Exception:
            raise
        except NotImplementedError as error:
            pytest.fail(f"{method}() raised NotImplementedError: raise self.unsupported(...) instead ({error})")
        except Exception as error:
            raise AssertionError(
                f"{method}() let {type(error).__module__}.{type(error).__qualname__} escape ({error}): "
                "translate it into dispatcher.plugin.errors with `raise ... from error`"
            ) from error
        finally:
            took = time.monotonic() - began
            if took > allowed + self.slack:
                pytest.fail(
                    f"{method}() took {took:.1f} s with a deadline of {allowed:.1f} s: "
                    "bound every wait by deadline.remaining()"
                )

    def _handle(self, method: str, handle: Handle) -> Handle:
        expect(isinstance(handle, Handle), f"{method}() must give a Handle, not {type(handle).__name__}")
        expect(
            handle.provider == self.name,
            f"{method}() gave a handle of provider {handle.provider!r}: it must be {self.name!r}, the class' name",
        )
        try:
            back = Handle.from_json(handle.to_json())
        except (TypeError, ValueError) as error:
            pytest.fail(
                f"{method}() gave a handle that is not JSON ({error}): keep only JSON values in Handle.data"
            )
        expect(
            back == handle,
            f"{method}() gave a handle that JSON changes ({handle.data!r} becomes {back.data!r}): "
            "use lists rather than tuples, and string keys",
        )
        return handle

    @staticmethod
    def _observation(method: str, seen: Observation) -> Observation:
        expect(isinstance(seen, Observation), f"{method}() must give an Observation, not {type(seen).__name__}")
        expect(
            isinstance(seen.state, BackendState),
            f"{method}() gave the state {seen.state!r}: use a member of BackendState",
        )
        expect(
            seen.endpoint is None or isinstance(seen.endpoint, Endpoint),
            f"{method}() gave the endpoint {seen.endpoint!r}: use Endpoint.unix, .tcp or .vsock",
        )
        return seen


class Steps:
    """Progress that takes notes, and does something at the call number `at` (1 is the first).

    :ivar told: the steps so far.
    """

    def __init__(self, at: int = 0, then: Callable[[], None] | None = None) -> None:
        self.at, self.then = at, then
        self.told: list[str] = []

    def __call__(self, step: str, detail: str = "", fraction: float | None = None) -> None:
        """Take a step."""
        expect(isinstance(step, str) and step, f"progress was called with the step {step!r}: a word or two")
        expect(fraction is None or 0 <= fraction <= 1, f"progress told the fraction {fraction!r}: 0 to 1 or None")
        self.told.append(step)
        if self.then and len(self.told) == self.at:
            self.then()


def cancel() -> None:
    """Stand for a newer intent."""
    raise Cancelled("A newer intent")
