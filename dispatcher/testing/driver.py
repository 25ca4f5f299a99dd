"""Calls a provider and checks each call: errors of the public tree only, in time, values of the promised types."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, DispatcherError, Unsupported
from dispatcher.plugin.model import (
    AgentSpec,
    BackendState,
    Capability,
    Depth,
    Endpoint,
    Handle,
    Observation,
    Usage,
)
from dispatcher.plugin.provider import Provider, no_progress

METHODS = {
    name: inspect.signature(method).parameters for name, method in vars(Provider).items() if callable(method)
}
#: Arguments of the contract that a check can leave out.
DEFAULTS: dict[str, Any] = {
    "grace": 0.2,
    "data": True,
    "depth": Depth.RAM,
    "tail": 100,
    "follow": False,
    "progress": no_progress,
}


def expect(condition: object, advice: str) -> None:
    """Fail the check with `advice` for the provider's author unless `condition` holds."""
    __tracebackhide__ = True
    if not condition:
        pytest.fail(advice)


@contextlib.contextmanager
def raises(wanted: type[DispatcherError], what: str) -> Iterator[None]:
    """Expect one error of the tree, with advice when another or none comes.

    :param what: what was called, for the message.
    """
    __tracebackhide__ = True
    try:
        yield
    except wanted:
        return
    except DispatcherError as error:
        pytest.fail(f"{what} raised {type(error).__name__} ({error}): raise {wanted.__name__}")
    pytest.fail(f"{what} succeeded: raise {wanted.__name__}")


def unsupported(what: str, call: Callable[[], object]) -> None:
    """Expect `Unsupported` of something that is not declared."""
    __tracebackhide__ = True
    with raises(Unsupported, f"{what} is not declared; it"):
        call()


class Driver:
    """A provider under test: has the methods of `Provider`, each call checked.

    Instead of `deadline` the methods take `seconds`, by default `patience`; the arguments in `DEFAULTS` are
    optional.  `list` returns a dictionary by agent, `logs` a list.

    :param provider: the real one; :param patience: seconds that a long call may take; :param slack: seconds
        that a call may take past its deadline.
    """

    def __init__(self, provider: Provider, *, patience: float, slack: float) -> None:
        self.provider = provider
        self.patience = patience
        self.slack = slack

    def can(self, capability: Capability) -> bool:
        """Whether the provider declares `capability`."""
        return capability in self.provider.capabilities

    def state(self, handle: Handle) -> BackendState:
        """Return the state that `observe` reports."""
        seen: Observation = self.observe(handle)
        return seen.state

    def ensure_doomed(self, spec: AgentSpec) -> Handle:
        """Start an app that ends at once: `ensure` returns, or raises `ProviderError`."""
        handle: Handle = self.handle(spec)
        try:
            self.ensure(spec)
        except DispatcherError as error:
            expect(
                error.code in {"provider-error", "start-failed"},
                f"ensure() raised {error.code}: raise ProviderError",
            )
        return handle

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """Return a method of the provider, its calls checked."""
        if method.startswith("_") or method not in METHODS:
            raise AttributeError(method)
        return functools.partial(self._call, method)

    def _call(self, method: str, *arguments: Any, seconds: float | None = None, **chosen: Any) -> Any:
        __tracebackhide__ = True
        wanted = METHODS[method]
        allowed = seconds if seconds is not None else 1.0 if method == "handle" else self.patience
        named = {name: value for name, value in DEFAULTS.items() if name in wanted} | chosen
        began = time.monotonic()
        if "deadline" in wanted:
            named["deadline"] = Deadline(allowed)
        try:
            result = getattr(self.provider, method)(*arguments, **named)
            if method in {"list", "logs"}:
                result = list(result)
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
                "translate it into an error of dispatcher.plugin with `raise ... from error`"
            ) from error
        finally:
            took = time.monotonic() - began
            if took > allowed + self.slack:
                pytest.fail(
                    f"{method}() took {took:.1f} s with a deadline of {allowed:.1f} s: "
                    "bound every wait by deadline.remaining()"
                )
        return self._checked(method, arguments, result)

    def _checked(self, method: str, arguments: tuple[Any, ...], result: Any) -> Any:
        """Return the result of a method once its type is checked."""
        __tracebackhide__ = True
        if method in {"handle", "ensure"}:
            self._check_handle(method, result)
        elif method == "observe":
            _check_observation(method, result)
        elif method == "list":
            return self._by_agent(result)
        elif method == "logs":
            for line in result:
                expect(isinstance(line, bytes), f"logs() must yield bytes, not {type(line).__name__}")
                expect(not line.endswith(b"\n"), "logs() must yield lines without their end: strip the newline")
        elif method == "usage":
            known = {handle.name for handle in arguments[0]}
            for name, usage in result.items():
                expect(
                    name in known and isinstance(usage, Usage),
                    f"usage() must map Handle.name to Usage, not {name!r} to {usage!r}",
                )
        return result

    def _by_agent(self, found: list[Any]) -> dict[str, tuple[Handle, Observation]]:
        agents: dict[str, tuple[Handle, Observation]] = {}
        for item in found:
            expect(
                isinstance(item, tuple) and len(item) == 2,
                f"list() must yield pairs of Handle and Observation, not {item!r}",
            )
            handle, seen = item
            self._check_handle("list", handle)
            _check_observation("list", seen)
            expect(handle.agent not in agents, f"list() yields the agent {handle.agent!r} twice; yield it once")
            agents[handle.agent] = (handle, seen)
        return agents

    def _check_handle(self, method: str, handle: Any) -> None:
        expect(isinstance(handle, Handle), f"{method}() must return a Handle, not {type(handle).__name__}")
        expect(
            handle.provider == self.provider.name,
            f"{method}() returned a handle of provider {handle.provider!r}: use the class's name",
        )
        try:
            back = Handle.from_json(handle.to_json())
        except (TypeError, ValueError) as error:
            pytest.fail(
                f"{method}() returned a handle that is not JSON ({error}): keep only JSON values in Handle.data"
            )
        expect(
            back == handle,
            f"{method}() returned a handle that JSON changes ({handle.data!r} becomes {back.data!r}): "
            "use lists rather than tuples, and string keys",
        )


def _check_observation(method: str, seen: Any) -> None:
    expect(isinstance(seen, Observation), f"{method}() must return an Observation, not {type(seen).__name__}")
    expect(
        isinstance(seen.state, BackendState),
        f"{method}() returned the state {seen.state!r}: use a member of BackendState",
    )
    expect(
        seen.endpoint is None or isinstance(seen.endpoint, Endpoint),
        f"{method}() returned the endpoint {seen.endpoint!r}: use Endpoint.unix, .tcp or .vsock",
    )


class Steps:
    """A `Progress` that records its steps, and calls `then` at the call number `at` (1 is the first).

    :ivar reported: the steps so far.
    """

    def __init__(self, at: int = 0, then: Callable[[], None] | None = None) -> None:
        self.at, self.then = at, then
        self.reported: list[str] = []

    def __call__(self, step: str, detail: str = "", fraction: float | None = None) -> None:
        """Record a step."""
        expect(isinstance(step, str) and step, f"progress was called with the step {step!r}: a word or two")
        expect(fraction is None or 0 <= fraction <= 1, f"progress got the fraction {fraction!r}: 0 to 1 or None")
        self.reported.append(step)
        if self.then and len(self.reported) == self.at:
            self.then()


def cancel() -> None:
    """Raise what a newer command for the agent raises."""
    raise Cancelled("A newer command")
