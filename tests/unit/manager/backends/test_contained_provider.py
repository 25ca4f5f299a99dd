"""Whatever a plugin raises, wherever it is called, is one error that names it; nothing else escapes."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path

import pytest
from pydantic import BaseModel, field_validator, model_serializer

from dispatcher.common.contained import PluginRef, contained
from dispatcher.config.check import app_faults
from dispatcher.config.load import parse
from dispatcher.config.plugins import Plugins
from dispatcher.manager.agents.specs import Specs
from dispatcher.manager.auth.local import LocalOptions
from dispatcher.manager.backends.contained_provider import ContainedProvider
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, DispatcherError, PluginError, ProviderError, Unavailable
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import AgentSpec, App, Depth, Handle, Isolation
from dispatcher.plugin.provider import Provider, no_progress
from tests.support.manager_parts import Parts


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


RAISED = [
    ValueError("oops"),
    SystemExit(3),
    GeneratorExit(),
    asyncio.CancelledError(),
    RecursionError("deep"),
    MemoryError(),
    StopIteration(),
    Unprintable(),
]
EACH = pytest.mark.parametrize("fault", RAISED, ids=lambda fault: type(fault).__name__)


def raising(fault):
    """Return a provider of which everything but the constants raises."""

    class Faulty:
        name, isolation = "faulty", Isolation.PROCESS

        def __getattr__(self, _name):
            def method(*_arguments, **_named):
                raise fault

            return method

        @property
        def capabilities(self):
            raise fault

        def close(self):
            raise fault

    return Faulty()


FAULTY = PluginRef("provider", "faulty", "acme 1")
APP = App(name="demo", provider="faulty", options=LocalOptions())
HANDLE = Handle(provider="faulty", agent="alice", name="dispatcher-0-alice")
SPEC = AgentSpec(
    installation="00000000",
    agent="alice",
    user="alice",
    app=APP,
    uid=1,
    gid=1,
    proxy_gid=1,
    data_dir=Path("/d"),
    run_dir=Path("/r"),
    log_dir=Path("/l"),
)
ARGUMENTS = {
    "app": APP,
    "spec": SPEC,
    "handle": HANDLE,
    "handles": [HANDLE],
    "grace": 1.0,
    "data": True,
    "depth": Depth.RAM,
    "tail": 1,
    "follow": False,
    "on_change": print,
    "directory": Path("/d"),
    "progress": no_progress,
}
METHODS = sorted(
    name
    for name, method in vars(Provider).items()
    if inspect.isfunction(method) and not name.startswith("_") and name not in {"unsupported", "close"}
)


def test_every_method_of_the_contract_is_contained():
    assert set(METHODS) <= {name for name in vars(ContainedProvider) if not name.startswith("_")}


@EACH
@pytest.mark.parametrize("method", METHODS)
def test_a_method_raises_nothing_but_errors_of_the_tree(method, fault):
    call = getattr(ContainedProvider(raising(fault), FAULTY), method)
    wanted = inspect.signature(getattr(Provider, method)).parameters
    named = {name: ARGUMENTS[name] for name in wanted if name in ARGUMENTS}
    if "deadline" in wanted:
        named["deadline"] = Deadline(5)
    with pytest.raises(ProviderError, match=f"The provider faulty failed in {method}: {type(fault).__name__}"):
        list(call(**named) or ())


@EACH
def test_close_raises_nothing_and_capabilities_an_error(fault):
    provider = ContainedProvider(raising(fault), FAULTY)
    with pytest.raises(ProviderError, match=r"report this fault to the authors of acme 1"):
        _ = provider.capabilities
    provider.close()


@EACH
def test_a_log_that_fails_in_the_middle_ends_with_an_error(fault):
    provider = raising(fault)

    def logs(*_arguments, **_named):
        yield b"first"
        raise fault

    provider.logs = logs
    lines = ContainedProvider(provider, FAULTY).logs(HANDLE, tail=2, follow=False, deadline=Deadline(5))
    assert next(lines) == b"first"
    with pytest.raises(ProviderError, match="The provider faulty failed in logs"):
        next(lines)


def test_a_reader_may_leave_a_log_early():
    provider, closed = raising(ValueError()), []

    def logs(*_arguments, **_named):
        try:
            yield from [b"first", b"second"]
        finally:
            closed.append(True)

    provider.logs = logs
    lines = ContainedProvider(provider, FAULTY).logs(HANDLE, tail=2, follow=False, deadline=Deadline(5))
    assert next(lines) == b"first"
    lines.close()
    assert closed


def test_errors_of_the_tree_and_cancellations_of_the_manager_pass():
    for error in (Cancelled("newer"), Unavailable("no answer")):
        with pytest.raises(type(error)) as caught, contained(FAULTY, "ensure"):
            raise error
        assert caught.value is error


def test_an_interrupt_passes_in_the_main_thread_alone():
    with pytest.raises(KeyboardInterrupt), contained(FAULTY, "check"):
        raise KeyboardInterrupt
    found = []

    def run():
        try:
            with contained(FAULTY, "check"):
                raise KeyboardInterrupt
        except DispatcherError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found


def test_a_secret_text_is_not_shown(caplog):
    with (
        pytest.raises(Unavailable) as caught,
        contained(FAULTY, "check", error=Unavailable, secret=True),
    ):
        raise ValueError("password hunter2")
    assert "hunter2" not in str(caught.value) + caplog.text
    assert "ValueError" in str(caught.value)
    assert caught.value.__cause__ is None


def plugins_with(options):
    class Faulty(Provider):
        name, isolation, Options, AppOptions = "faulty", Isolation.PROCESS, LocalOptions, options
        capabilities = frozenset()
        check = explain = prepare = handle = ensure = observe = stop = destroy = list = None

    class Plugin:
        @hookimpl
        def dispatcher_register_providers(self):
            return [Faulty]

    plugins = Plugins(())
    plugins.register("faulty", Plugin())
    return plugins


def validating(fault):
    class Options(BaseModel):
        image: str = "a"

        @field_validator("image", mode="before")
        @classmethod
        def check(cls, value):
            raise fault

    return Options, {"image": "b"}


def serialising(fault):
    class Options(BaseModel):
        @model_serializer
        def dump(self):
            raise fault

    return Options, {}


@EACH
@pytest.mark.parametrize("options", [validating, serialising])
def test_the_options_of_an_app_raise_nothing_but_errors_of_the_tree(options, fault, tmp_path):
    if options is validating and isinstance(fault, ValueError):
        return  # pydantic's own way to refuse a value
    model, table = options(fault)
    config = parse({"apps": {"demo": {"provider": "faulty", "faulty": table}}})
    specs = Specs(config=config, plugins=plugins_with(model), data=None, installation="00000000", proxy_gid=1)
    with pytest.raises((PluginError, ProviderError), match="provider faulty failed in"):
        specs.check("demo")
    if options is validating:
        with pytest.raises(DispatcherError, match="failed in"):
            config.validate_providers(plugins_with(model))


@EACH
def test_a_check_of_the_configuration_names_a_provider_that_fails(fault):
    plugins = plugins_with(LocalOptions)
    plugins.provider("faulty").faults = lambda _self, _app: raising(fault).faults()
    found = list(app_faults(parse({"apps": {"demo": {"provider": "faulty"}}}), plugins, ["demo"]))
    assert [text for text in found if "The provider faulty failed in faults" in text]


@EACH
def test_an_authenticator_raises_nothing_but_errors_of_the_tree(fault, tmp_path):
    from dispatcher.plugin.authenticator import Authenticator

    class Faulty(Authenticator):
        name, Options = "faulty", LocalOptions

        def authenticate(self, name, password, *, deadline):
            raise fault

        def set_password(self, user, password, *, deadline):
            raise fault

    parts = Parts(tmp_path, authenticator=Faulty(options=LocalOptions()))
    assert parts.login().status_code == 503
    assert "The authenticator faulty failed in authenticate" in str(parts.authenticator.problem)
    with pytest.raises(Unavailable, match="cannot be checked at the moment"):
        parts.services.signin.set_password("alice", "correct horse")
    assert "The authenticator faulty failed in set_password" in str(parts.authenticator.problem)
    parts.close()
