"""Providers that work but for one fault; `CASES` says what it leads to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_serializer

from dispatcher.plugin import (
    BackendState,
    Cancelled,
    DispatcherError,
    Endpoint,
    Finding,
    Handle,
    Observation,
    Provider,
    ProviderError,
    Unavailable,
    Usage,
    hookimpl,
)
from tests.support.broken import Case
from tests.support.fake_provider import FakeAppOptions, FakeBackend, FakeProvider

CASES: dict[str, Case] = {}
_ATTRIBUTES: dict[str, str] = {}
AUTHORS = "acme-broken 1.2"


class Good(FakeProvider):
    """Works: the fake provider with a backend of its own for each name."""

    def __init__(self, *, context: Any, options: Any) -> None:
        super().__init__(context=context, options=options)
        self.backend = FakeBackend.named(self.name)


class Plugin:
    """A plugin with one hook."""

    def __init__(self, hook: Callable[[], Any]) -> None:
        self._hook = hook

    @hookimpl
    def dispatcher_register_providers(self) -> Any:
        return self._hook()


def _declare(name: str, hook: Callable[[], Any], case: Case) -> None:
    attribute = f"plugin_{name.replace('-', '_')}"
    globals()[attribute] = Plugin(hook)
    _ATTRIBUTES[name], CASES[name] = attribute, case


def case(outcome: str, *words: str, **app: object) -> Callable[[type], type]:
    """Declare a provider class as a plugin of its own, named after it."""

    def add(cls: type) -> type:
        name = cls.__name__.strip("_").lower().replace("_", "-")
        if "name" not in vars(cls):
            cls.name = name  # type: ignore[attr-defined]
        _declare(name, lambda: [cls], Case(outcome, words, app))
        return cls

    return add


def hook(outcome: str, *words: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Declare a hook as a plugin."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        _declare(function.__name__.replace("_", "-"), function, Case(outcome, words, {}))
        return function

    return add


def entries() -> Iterator[tuple[str, str]]:
    """Yield the name and the attribute of each plugin."""
    yield from _ATTRIBUTES.items()


_released = threading.Event()


def forever() -> None:
    """Do not return before the end of the tests that called it."""
    _released.wait()


def release() -> None:
    """End the threads that hang."""
    global _released
    _released.set()
    _released = threading.Event()


class Unspeakable(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise SystemExit("no text")


# --- the hook


@hook("refused", "SystemExit: 3")
def hook_exits() -> Any:
    raise SystemExit(3)


@hook("refused", "KeyboardInterrupt")
def hook_interrupts() -> Any:
    raise KeyboardInterrupt


@hook("refused", "does not return")
def hook_hangs() -> Any:
    forever()


@hook("refused", "registers no provider")
def hook_none() -> Any:
    return None


@hook("refused", "not a subclass")
def hook_text() -> Any:
    return "provider"


@hook("refused", "GeneratorExit")
def hook_breaks_off() -> Any:
    yield from ()
    raise GeneratorExit


@hook("refused", "calls itself 'fake'")
def hook_endless() -> Any:
    while True:
        yield Good


@hook("refused", "not a subclass")
def hook_instance() -> Any:
    return [object()]


# --- the class


@case("refused", "calls itself 'subprocess'")
class Usurper(Good):
    name = "subprocess"


@case("refused", "calls itself 'another'")
class Two_Names(Good):
    name = "another"


@case("refused", "has no name")
class Number_As_Name(Good):
    name = 5


@case("refused", "version 7")
class Later_Contract(Good):
    api_version = 7


@case("refused", "isolation")
class Isolation_Text(Good):
    isolation = "container"


@case("refused", "Options")
class No_Options(Good):
    Options = None


@case("refused", "AppOptions")
class Dict_Options(Good):
    AppOptions = {"image": str}


@case("refused", "ensure")
class Incomplete(Provider):
    isolation = Good.isolation
    Options, AppOptions = Good.Options, Good.AppOptions
    capabilities = frozenset()


@case("fails", "SystemExit: '4'")
class Init_Exits(Good):
    def __init__(self, **_more):
        raise SystemExit(4)


@case("fails", "KeyboardInterrupt")
class Init_Interrupts(Good):
    def __init__(self, **_more):
        raise KeyboardInterrupt


@case("fails", "does not return")
class Init_Hangs(Good):
    def __init__(self, **_more):
        forever()


@case("fails", "TypeError")
class Init_Positional(Good):
    def __init__(self, context):
        pass


@case("fails", "capabilities", "SystemExit")
class Capabilities_Exit(Good):
    @property
    def capabilities(self):
        raise SystemExit


@case("fails", "does not return")
class Capabilities_Hang(Good):
    @property
    def capabilities(self):
        forever()


@case("fails", "capabilities")
class Capabilities_Invented(Good):
    capabilities = frozenset({"fly"})


# --- its options


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def validating(fault: BaseException | None) -> type[BaseModel]:
    """Return options whose validator raises, or hangs."""

    class Options(_Strict):
        image: str = "probe"

        @field_validator("image", mode="before")
        @classmethod
        def check(cls, value: str) -> str:
            if fault is None:
                forever()
            raise fault

        model_config = ConfigDict(extra="forbid", validate_default=True)

    return Options


@case("refused", "RuntimeError")
class Validator_Raises(Good):
    AppOptions = validating(RuntimeError("no"))


@case("refused", "SystemExit")
class Validator_Exits(Good):
    AppOptions = validating(SystemExit("no"))


@case("refused", "does not return")
class Validator_Hangs(Good):
    AppOptions = validating(None)


@case("fails", "RuntimeError")
class Options_Raise(Good):
    Options = validating(RuntimeError("no"))


@case("fails", "does not return")
class Options_Hang(Good):
    Options = validating(None)


@case("refused", "SystemExit")
class Serialiser_Exits(Good):
    class AppOptions(FakeAppOptions):
        @model_serializer
        def dump(self):
            raise SystemExit


# --- a start


def raising(method: str, fault: Callable[[], BaseException]) -> type:
    """Return a provider of which one method raises."""

    def call(_self: object, *_arguments: object, **_named: object) -> Any:
        raise fault()

    return type("Raising", (Good,), {method: call})


def returning(method: str, value: object) -> type:
    """Return a provider of which one method returns a value."""
    return type("Returning", (Good,), {method: lambda *_arguments, **_named: value})


@case("fails", "prepare", "SystemExit: 'bye'")
class Prepare_Exits(raising("prepare", lambda: SystemExit("bye"))): ...


@case("fails", "does not return", prepare_timeout=0.3)
class Prepare_Hangs(Good):
    def prepare(self, app, *, deadline, progress):
        forever()


@case("fails", "invalid value from handle")
class Handle_None(returning("handle", None)): ...


@case("fails", "handle", "JSON")
class Handle_Object(Good):
    def handle(self, spec):
        return replace(super().handle(spec), data={"self": self})


@case("fails", "does not return")
class Handle_Hangs(Good):
    def handle(self, spec):
        forever()


@case("fails", "invalid value from handle")
class Handle_Surrogate(Good):
    def handle(self, spec):
        return replace(super().handle(spec), name="a\udc80")


@case("fails", "invalid value from handle")
class Handle_Huge(Good):
    def handle(self, spec):
        return replace(super().handle(spec), data={"a": "x" * (20 << 20)})


@case("fails", "ensure", "KeyboardInterrupt")
class Ensure_Interrupts(raising("ensure", KeyboardInterrupt)): ...


@case("fails", "ensure", "CancelledError")
class Ensure_Cancels(raising("ensure", asyncio.CancelledError)): ...


@case("fails", "ensure", "Unspeakable")
class Ensure_Unspeakable(raising("ensure", Unspeakable)): ...


@case("fails", "ensure", "StopIteration")
class Ensure_Stops_Iteration(raising("ensure", StopIteration)): ...


@case("fails", "does not return", start_timeout=0.3)
class Ensure_Hangs(Good):
    def ensure(self, spec, *, deadline, progress):
        forever()


@case("fails", "Refused", "disk on fire")
class Why_Exception(raising("ensure", lambda: ProviderError("Refused", why=OSError("disk on fire")))): ...


@case("fails", "Refused")
class Why_Unspeakable(raising("ensure", lambda: ProviderError("Refused", why=Unspeakable()))): ...


@case("fails", "Refused", "some bytes")
class Fix_Bytes(raising("ensure", lambda: ProviderError("Refused", fix=b"some bytes"))): ...


@case("fails", "Refused")
class Why_Surrogate(raising("ensure", lambda: ProviderError("Refused", why="caf\udce9"))): ...


@case("fails", "Refused")
class Why_Huge(raising("ensure", lambda: ProviderError("Refused", why="x" * (20 << 20)))): ...


@case("fails", "failed in ensure")
class What_None(raising("ensure", lambda: ProviderError(None))): ...


@case("fails", "Refused")
class Details_Object(raising("ensure", lambda: ProviderError("Refused", details={"self": object()}))): ...


@case("fails", "Refused")
class Details_List(raising("ensure", lambda: ProviderError("Refused", details=["a"]))): ...


@case("fails", "Refused")
class Retry_Text(raising("ensure", lambda: ProviderError("Refused", retry_after="soon"))): ...


@case("fails", "Refused")
class Status_Text(
    raising(
        "ensure", lambda: type("Own", (ProviderError,), {"status": "bad", "code": 7, "exit_code": "x"})("Refused")
    )
): ...


@case("fails", "Uninitialised")
class Error_Without_Texts(
    raising("ensure", lambda: type("Uninitialised", (DispatcherError,), {"__init__": lambda self: None})())
): ...


@case("fails", "without a cancellation")
class Cancels_Itself(raising("ensure", lambda: Cancelled("I do not want to"))): ...


@case("fails", "invalid value from ensure")
class Ensure_Nothing(returning("ensure", None)): ...


@case("fails", "invalid value from ensure")
class Ensure_Other_Agent(
    returning("ensure", Handle(provider="ensure-other-agent", agent="mallory", name="x"))
): ...


@case("runs")
class Progress_Nonsense(Good):
    def ensure(self, spec, *, deadline, progress):
        progress(self, {"a": 1}, "half")
        progress("x" * 1_000_000, "\x1b[31m\udc80", float("nan"))
        progress(Unspeakable(), Unspeakable(), Unspeakable())
        return super().ensure(spec, deadline=deadline, progress=progress)


class Hostile(ProviderError):
    """Runs code of its own wherever it is looked at."""

    def __getattribute__(self, name):
        raise SystemExit(name)


@case("fails", "Hostile")
class Error_With_Own_Attributes(raising("ensure", lambda: Hostile("Refused"))): ...


@case("fails", "Mute")
class Error_Without_Class(
    raising("ensure", lambda: type("Mute", (Exception,), {"__class__": property(lambda self: 1 / 0)})())
): ...


@case("fails", "BaseExceptionGroup")
class Error_Group(raising("ensure", lambda: BaseExceptionGroup("all", [SystemExit(1), Unspeakable()]))): ...


@case("fails", "levels")
class Handle_Deep(Good):
    def handle(self, spec):
        data = {}
        for _ in range(100_000):
            data = {"more": data}
        return replace(super().handle(spec), data=data)


@case("fails", "New", "type str")
class New_Makes_Another(Good):
    def __new__(cls, **_more):
        return "a provider"


@case("runs")
class Changes_Arguments(Good):
    """Changes what it gets; see also `test_what_a_provider_changes_of_its_arguments_affects_nobody`."""

    def ensure(self, spec, *, deadline, progress):
        spec.app.environment["CHANGED"] = "yes"
        spec.app.options.command.append("changed") if hasattr(spec.app.options, "command") else None
        spec.secrets.clear()
        return super().ensure(spec, deadline=deadline, progress=progress)


class OwnText(str):
    """A text with code of its own, like `numpy.str_` but worse."""

    def __leave(self, *_arguments):
        raise SystemExit("code of a plugin")

    __str__ = __repr__ = __format__ = __len__ = encode = isprintable = __leave


class OwnNumber(float):
    """A number with code of its own, like `numpy.float64` but worse."""

    def __leave(self, *_arguments):
        raise SystemExit("code of a plugin")

    __float__ = __repr__ = __format__ = __add__ = __radd__ = __sub__ = __rsub__ = __round__ = __leave


class OwnTable(dict):
    def items(self):
        while True:
            yield "again", "again"


@case("runs")
class Values_Of_Own_Types(Good):
    def handle(self, spec):
        found = super().handle(spec)
        texts = {key: OwnText(getattr(found, key)) for key in ("provider", "agent", "name")}
        return Handle(**texts, data={"name": [texts["name"]]})

    def ensure(self, spec, *, deadline, progress):
        found = super().ensure(spec, deadline=deadline, progress=progress)
        progress(OwnText("step"), OwnText("detail"), OwnNumber(0.5))
        return replace(found, data=OwnTable(found.data))

    def observation(self, known):
        found = super().observation(known)
        text = OwnText(found.spec_hash)
        return replace(found, started_at=OwnNumber(5.0), spec_hash=text, detail=OwnText("fine"))

    def usage(self, handles, *, deadline):
        return {OwnText(handle.name): Usage(memory=5, cpu_seconds=OwnNumber(1.5)) for handle in handles}

    def logs(self, handle, *, tail, follow, deadline):
        yield type("OwnBytes", (bytes,), {"__getitem__": lambda *_: 1 / 0})(b"a line")

    def explain(self, app):
        return [Finding.ok(OwnText("fine"))]


# --- observations


def observing(**changes: object) -> type:
    """Return a provider whose observations have changed fields."""

    class Observing(Good):
        def observation(self, known):
            return replace(super().observation(known), **changes)

    return Observing


@case("fails", "invalid value from observe")
class Observe_Nothing(returning("observe", None)): ...


@case("fails", "invalid value from observe")
class Observe_Dict(returning("observe", {"state": "running"})): ...


@case("fails", "invalid value from observe", "state")
class Observe_State_Text(observing(state="running")): ...


@case("fails", "invalid value from observe", "owner_uid")
class Observe_Huge_Uid(observing(owner_uid=2**70)): ...


@case("fails", "invalid value from observe", "owner_uid")
class Observe_Negative_Uid(observing(owner_uid=-5)): ...


@case("fails", "invalid value from observe", "started_at")
class Observe_Start_Nan(observing(started_at=float("nan"))): ...


@case("fails", "invalid value from observe", "started_at")
class Observe_Start_Huge(observing(started_at=10**400)): ...


@case("fails", "invalid value from observe", "oom_kills")
class Observe_Kills_Huge(observing(oom_kills=2**80)): ...


@case("fails", "invalid value from observe", "spec_hash")
class Observe_Hash_Huge(observing(spec_hash="x" * (20 << 20))): ...


@case("fails", "invalid value from observe", "detail")
class Observe_Detail_Object(observing(detail=OSError("busy"))): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Text(observing(endpoint="tcp:127.0.0.1:80")): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Pigeon(observing(endpoint=Endpoint(kind="pigeon"))): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Port(observing(endpoint=Endpoint.tcp("127.0.0.1", 70_000))): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Host(observing(endpoint=Endpoint.tcp("a" * 1000, 80))): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Nul(observing(endpoint=Endpoint.unix("/tmp/a\0b"))): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Relative(observing(endpoint=Endpoint.unix("s"))): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Path_Bytes(observing(endpoint=Endpoint(kind="unix", path=b"/tmp/s"))): ...


@case("fails", "invalid value from observe", "endpoint")
class Endpoint_Cid(observing(endpoint=Endpoint.vsock(2**40, 1))): ...


def ended(reason: object) -> type:
    """Return a provider whose agents end at once, for this reason."""
    return observing(state=BackendState.STOPPED, endpoint=None, exit_reason=reason)


@case("fails", "invalid value from observe", "exit_reason")
class Exit_Bytes(ended(b"exit code 1")): ...


@case("fails", "ended before it was ready", "code \\udcff")
class Exit_Surrogate(ended("code \udcff")): ...


@case("fails", "ended before it was ready", "xxx")
class Exit_Huge(ended("x" * (20 << 20))): ...


@case("fails", "ended before it was ready")
class Exit_Controls(ended("\x1b[31mred\nline")): ...


# --- what is asked of running agents: they run, and the question has an answer


def using(value: Any) -> type:
    """Return a provider that returns this as usage of each agent."""

    class Using(Good):
        def usage(self, handles, *, deadline):
            return {handle.name: value for handle in handles}

    return Using


@case("runs")
class Usage_Lots(using(Usage(memory="lots"))): ...


@case("runs")
class Usage_Nan(using(Usage(memory=1, cpu_seconds=float("nan")))): ...


@case("runs")
class Usage_Infinite(using(Usage(cpu_seconds=float("inf"), disk=float("inf")))): ...


@case("runs")
class Usage_Negative(using(Usage(memory=-1))): ...


@case("runs")
class Usage_Huge(using(Usage(memory=2**80, disk_limit=10**400))): ...


@case("runs")
class Usage_True(using(Usage(memory=True, cpu_seconds="3"))): ...


@case("runs")
class Usage_Other(using("much")): ...


@case("runs")
class Usage_Nothing(returning("usage", None)): ...


@case("runs")
class Usage_Exits(raising("usage", lambda: SystemExit(5))): ...


@case("runs")
class Usage_Hangs(Good):
    def usage(self, handles, *, deadline):
        forever()


@case("runs")
class Logs_Endless(Good):
    def logs(self, handle, *, tail, follow, deadline):
        while True:
            yield b"again"


@case("runs")
class Logs_Text(returning("logs", ["a line"])): ...


@case("runs")
class Logs_Nothing(returning("logs", None)): ...


@case("runs")
class Logs_Huge(returning("logs", [b"x" * (20 << 20)])): ...


@case("runs")
class Logs_Exit(Good):
    def logs(self, handle, *, tail, follow, deadline):
        yield b"first"
        raise SystemExit


@case("runs")
class Logs_Hang(Good):
    def logs(self, handle, *, tail, follow, deadline):
        forever()
        yield b""


@case("runs")
class Explain_Nothing(returning("explain", None)): ...


@case("runs")
class Explain_Texts(returning("explain", ["fine"])): ...


@case("runs")
class Explain_Objects(returning("explain", [Finding(level="fine", what=OSError("no"))])): ...


@case("runs")
class Explain_Endless(Good):
    def explain(self, app):
        while True:
            yield Finding.ok("fine")


@case("runs")
class Check_Exits(raising("check", lambda: SystemExit(6))): ...


@case("runs")
class Check_Hangs(Good):
    def check(self, *, deadline):
        forever()


@case("runs")
class Faults_Numbers(returning("faults", [1, 2])): ...


@case("runs")
class Watch_Exits(raising("watch", lambda: SystemExit(7))): ...


@case("runs")
class Watch_Nothing(returning("watch", None)): ...


@case("runs")
class Watch_Nonsense(Good):
    def watch(self, on_change):
        for value in (None, b"a", ["a"], "\udc80", "x" * 1_000_000):
            on_change(value)
        return super().watch(on_change)


@case("runs")
class Runs_Nowhere(Good):
    """No app of the tests has it."""


del CASES["runs-nowhere"]


# --- the list of all agents: without it the backend is not reachable


@case("unknown", "failed in list", "SystemExit: '8'")
class List_Exits(raising("list", lambda: SystemExit(8))): ...


@case("unknown", "The engine is away", "no")
class List_Away(raising("list", lambda: Unavailable("The engine is away", why=OSError("no")))): ...


@case("unknown", "invalid value from list")
class List_Nothing(returning("list", None)): ...


@case("unknown", "did not finish its list")
class List_Endless(Good):
    def list(self, *, deadline):
        while True:
            yield Handle(provider=self.name, agent="a", name="b"), Observation(state=BackendState.RUNNING)


@case("unknown", "invalid value from list", "agent")
class List_Surrogates(Good):
    def list(self, *, deadline):
        return [
            (Handle(provider=self.name, agent="\udc80", name="\udc81"), Observation(state=BackendState.RUNNING))
        ]


@case("unknown", "does not return", "list")
class List_Hangs(Good):
    def list(self, *, deadline):
        forever()
