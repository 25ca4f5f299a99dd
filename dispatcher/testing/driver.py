"""Calls a provider and checks each call: errors of the public tree only, in time, values of the promised types.

Each call has its own thread and time limit: one that blocks is a verdict, and the next check runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import pytest

from dispatcher.common import plugin_values
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, DispatcherError, Unsupported
from dispatcher.plugin.model import AgentSpec, BackendState, Capability, Depth, Handle, Observation
from dispatcher.plugin.provider import Provider, no_progress
from dispatcher.testing.verdict import Hangs, within

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


_T = TypeVar("_T")


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
        return capability in self.capabilities()

    def capabilities(self) -> frozenset[Capability]:
        """Return what the provider declares."""
        __tracebackhide__ = True
        return self._in_time("capabilities", lambda: self.provider.capabilities, 1.0, "it must not block")

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
        named = {name: value for name, value in DEFAULTS.items() if name in wanted} | chosen
        allowed, advice = self.patience, "it must not block"
        if "deadline" in wanted:
            allowed = self.patience if seconds is None else seconds
            advice = "bound every wait by deadline.remaining()"
            named["deadline"] = Deadline(allowed)
        elif method == "handle":
            allowed = 1.0

        def call() -> Any:
            result = getattr(self.provider, method)(*arguments, **named)
            return list(result) if method in {"explain", "faults", "list", "logs"} else result

        return self._checked(method, arguments, self._in_time(f"{method}()", call, allowed, advice))

    def _in_time(self, what: str, call: Callable[[], _T], allowed: float, advice: str) -> _T:
        """Make a call of the provider within `allowed` and `slack` seconds; check what it raises."""
        __tracebackhide__ = True
        try:
            return within(allowed + self.slack, call)
        except Hangs:
            pytest.fail(f"{what} has not returned after {allowed:.1f} s and {self.slack:.1f} s of slack: {advice}")
        except DispatcherError as error:
            _check_error(what, error)
            raise
        except (pytest.fail.Exception, pytest.skip.Exception):
            raise
        except NotImplementedError as error:
            pytest.fail(f"{what} raised NotImplementedError: raise self.unsupported(...) instead ({error})")
        except BaseException as error:
            _escaped(what, error)

    def _checked(self, method: str, arguments: tuple[Any, ...], result: Any) -> Any:
        """Return the result of a method once its type is checked."""
        __tracebackhide__ = True
        if method in {"handle", "ensure"}:
            self._check_handle(method, result)
        elif method == "observe":
            _check_value(method, plugin_values.observation, result)
        elif method == "list":
            return self._by_agent(result)
        elif method == "explain":
            for finding in result:
                _check_value(method, plugin_values.finding, finding)
        elif method == "logs":
            for line in result:
                expect(isinstance(line, bytes), f"logs() must yield bytes, not {type(line).__name__}")
                expect(not line.endswith(b"\n"), "logs() must yield lines without their end: strip the newline")
        elif method == "usage":
            known = {handle.name for handle in arguments[0]}
            for name, usage in result.items():
                expect(name in known, f"usage() must map Handle.name to Usage, not {name!r} to {usage!r}")
                _check_value(method, plugin_values.usage, usage)
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
            _check_value("list", plugin_values.observation, seen)
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


def _escaped(what: str, error: BaseException) -> NoReturn:
    __tracebackhide__ = True
    pytest.fail(
        f"{what} let {type(error).__module__}.{type(error).__qualname__} escape ({error}): "
        "translate it into an error of dispatcher.plugin with `raise ... from error`"
    )


def _check_error(what: str, error: DispatcherError) -> None:
    """Expect texts that can be shown, and details that can be sent."""
    __tracebackhide__ = True
    kind = type(error).__name__
    for name in ("what", "why", "fix"):
        value = getattr(error, name, None)
        expect(
            isinstance(value, str),
            f"{what} raised {kind} whose `{name}` is of type {type(value).__name__}: use str(...)",
        )
    expect(error.what.strip(), f"{what} raised {kind} without a word: say what happened, why, and what to do")
    try:
        json.dumps(error.details)
    except (TypeError, ValueError) as fault:
        pytest.fail(f"{what} raised {kind} whose `details` are not JSON ({fault}): use plain values")


def _check_value(method: str, check: Callable[[object], object], value: object) -> None:
    """Expect a value that the manager accepts, and does not have to clean."""
    __tracebackhide__ = True
    try:
        cleaned = check(value)
    except ValueError as error:
        pytest.fail(f"{method}() returned {type(value).__name__}: {error}")
    expect(
        cleaned == value,
        f"{method}() returned {value!r}: its texts must be short, without control characters",
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
