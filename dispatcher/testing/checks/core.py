"""Tier *core*, first part: what must hold before any agent runs.  No opt-out."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from dispatcher.config.load import parse
from dispatcher.plugin.errors import (
    DispatcherError,
    NotFound,
    ProviderError,
    Unavailable,
    Unsupported,
)
from dispatcher.plugin.model import BackendState, Capability, Handle
from dispatcher.plugin.provider import Provider
from dispatcher.testing.base import Contract
from dispatcher.testing.checks.plugin import load
from dispatcher.testing.declared import expect_key_refused
from dispatcher.testing.driver import Driver, expect, raises
from dispatcher.testing.kit import Kit

#: Difficult names: long, with equal slugs, like options, with characters of markup and shells.
ODD_NAMES = (
    "a" * 255,
    "ø" * 120 + "-" + "漢" * 100,
    "a-b:c",
    "a:b-c",
    "user-x",
    "user_x",
    "user.x",
    "user+x@example.org",
    "0",
    "null",
    "x" * 40 + "1",
    "x" * 40 + "2",
)


class CoreChecks(Contract, page="docs/howto/write-a-provider.md"):
    """Identity, options, handles, absence."""

    def test_check_accepts_the_backend(self, driver: Driver) -> None:
        """`check` returns when the backend is usable; repeated calls work."""
        driver.check()
        driver.check()

    def test_capabilities_are_constant_and_quick(self, driver: Driver) -> None:
        """`capabilities` is a frozen set of members, the same each time, without a call to the backend."""
        driver.check()
        began = time.monotonic()
        first = driver.capabilities()
        for _ in range(100):
            expect(driver.capabilities() == first, "capabilities changes between two reads: decide in check()")
        expect(time.monotonic() - began < 0.5, "capabilities is slow: it must not ask the backend")
        expect(
            isinstance(first, frozenset) and all(isinstance(one, Capability) for one in first),
            f"capabilities must be a frozenset of Capability, not {first!r}",
        )

    def test_explain_describes_isolation(self, driver: Driver, kit: Kit) -> None:
        """`explain` describes the isolation in whole sentences, for the backend and for an app."""
        for app in (None, kit.app()):
            findings = driver.explain(app)
            expect(findings, f"explain({'app' if app else 'None'}) says nothing: name what is isolated from what")
            for finding in findings:
                expect(
                    len(finding.what.split()) >= 3,
                    f"explain() gave {finding!r}: make `what` a sentence",
                )

    @pytest.mark.parametrize("table", ["app", "provider"])
    def test_unknown_option_is_refused_with_its_path(self, provider: Provider, table: str) -> None:
        """A misspelt key is an error that names its full path."""
        _expect_refused(provider, table, "no_such_option", "x", dict(self.app_options()))

    @pytest.mark.parametrize("table", ["app", "provider"])
    def test_wrong_type_is_refused_with_its_path(self, provider: Provider, table: str) -> None:
        """A value of a wrong type is an error that names its full path, for every key."""
        model = type(provider).AppOptions if table == "app" else type(provider).Options
        for key in model.model_fields:
            _expect_refused(provider, table, key, [{"never": [None]}, 3.5], dict(self.app_options()))

    def test_options_are_json(self, driver: Driver, kit: Kit) -> None:
        """An app's fingerprint is stable JSON: it decides whether an agent is outdated."""
        try:
            first, second = (json.dumps(kit.app().fingerprint(), sort_keys=True) for _ in range(2))
        except (TypeError, ValueError) as error:
            pytest.fail(f"AppOptions cannot be written as JSON ({error}): use plain types")
        expect(first == second, "AppOptions differ between two reads of one table: defaults must not be random")

    def test_handle_is_pure(self, driver: Driver, kit: Kit) -> None:
        """`handle` gives the same for the same spec, also from another instance, without a call to the backend."""
        spec = kit.spec("pure")
        first = driver.handle(spec)
        expect(
            driver.handle(spec) == first,
            "handle() gives another handle for the same spec: derive it from the spec",
        )
        other = self.drive_another(driver.provider)
        expect(
            other.handle(spec) == first,
            "handle() of a fresh instance differs: keep nothing of the instance in it",
        )
        other.close()
        expect(
            first.name == spec.backend_name,
            f"Handle.name is {first.name!r}: it must be spec.backend_name ({spec.backend_name!r})",
        )
        expect(first.agent == spec.agent, f"Handle.agent is {first.agent!r}: it must be spec.agent")

    def test_handles_do_not_collide(self, driver: Driver, kit: Kit) -> None:
        """Odd names give different, short, legal backend names."""
        handles = [driver.handle(kit.spec(name)) for name in ODD_NAMES]
        expect(
            len({handle.name for handle in handles}) == len(ODD_NAMES),
            "two agents got one backend name: use spec.backend_name, which holds a hash",
        )
        for handle in handles:
            expect(
                re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", handle.name),
                f"the backend name {handle.name!r} is not legal everywhere: use spec.backend_name",
            )

    def test_handle_survives_json(self, driver: Driver, kit: Kit) -> None:
        """A handle that was stored and read again works the same."""
        handle = driver.handle(kit.spec("json"))
        text = handle.to_json()
        expect(len(text) < 16_384, f"a handle of {len(text)} bytes: keep in it only what finds the agent again")
        expect(
            driver.state(Handle.from_json(text)) is BackendState.ABSENT, "a handle read from JSON is not ABSENT"
        )

    def test_absent_is_absent(self, driver: Driver, kit: Kit) -> None:
        """`observe` of an agent that never existed returns ABSENT, and it is not listed."""
        kit.gone(driver, driver.handle(kit.spec("never")))

    def test_absent_stop_is_success(self, driver: Driver, kit: Kit) -> None:
        """`stop` of an absent agent succeeds."""
        _succeeds("stop", lambda: driver.stop(driver.handle(kit.spec("never"))))

    @pytest.mark.parametrize("data", [False, True])
    def test_absent_destroy_is_success(self, driver: Driver, kit: Kit, data: bool) -> None:
        """`destroy` of an absent agent succeeds, with and without its data."""
        _succeeds("destroy", lambda: driver.destroy(driver.handle(kit.spec("never")), data=data))

    def test_foreign_handle_data_is_contained(self, driver: Driver, kit: Kit) -> None:
        """A handle with empty or odd data (from an older release) is an absent agent or raises a public error."""
        real = driver.handle(kit.spec("never"))
        for data in ({}, {"odd": [1, {"x": None}]}):
            handle = Handle(provider=real.provider, agent=real.agent, name=real.name, data=data)
            try:
                state = driver.state(handle)
            except DispatcherError:
                continue
            expect(state is BackendState.ABSENT, f"a handle with the data {data!r} is {state.value}, not absent")

    def test_prepare_is_idempotent(self, driver: Driver, kit: Kit) -> None:
        """A second `prepare` has no effect and is fast."""
        app = kit.app()
        driver.prepare(app)
        began = time.monotonic()
        driver.prepare(app)
        took = time.monotonic() - began
        expect(
            took < max(1.0, self.patience / 5),
            f"the second prepare() took {took:.1f} s: look first whether anything is to do",
        )

    def test_missing_image_is_a_provider_error(self, driver: Driver, kit: Kit) -> None:
        """An image that does not exist is a `ProviderError` with a fix; nothing is left behind."""
        spec = kit.spec("missing", options=self.missing_options())
        kit.fresh(driver.handle(spec))
        with self.leaves_nothing(kit, "a start that failed"):
            try:
                driver.prepare(spec.app)
                driver.ensure(spec)
            except Unavailable as error:
                pytest.fail(f"a missing image or program is {type(error).__name__}: raise ProviderError")
            except ProviderError as error:
                expect(error.fix, f"the error {str(error)!r} does not say what to do: give it `fix`")
            except DispatcherError as error:
                pytest.fail(f"a missing image or program raised {type(error).__name__}: raise ProviderError")
            else:
                pytest.fail("neither prepare() nor ensure() noticed that the image or program is missing")

    def test_absent_resume_is_not_found(self, driver: Driver, kit: Kit) -> None:
        """`resume` of an absent agent raises `NotFound`, so that the core creates it again (or `Unsupported`)."""
        sleeps = driver.can(Capability.SUSPEND) or driver.can(Capability.HIBERNATE)
        with raises(NotFound if sleeps else Unsupported, "resume() of an absent agent"):
            driver.resume(driver.handle(kit.spec("never")))


def _succeeds(method: str, call: Any) -> None:
    try:
        call()
        call()
    except DispatcherError as error:
        pytest.fail(f"{method}() of an absent agent raised {type(error).__name__} ({error}): absent is success")


def _expect_refused(provider: Provider, table: str, key: str, value: Any, app_options: dict[str, Any]) -> None:
    __tracebackhide__ = True
    plugins, name = load(type(provider)), provider.name
    tables: dict[str, Any] = {"apps": {"kit": {"provider": name, name: app_options}}, "providers": {name: {}}}
    path, model = (f"apps.kit.{name}", "AppOptions") if table == "app" else (f"providers.{name}", "Options")
    (tables["apps"]["kit"][name] if table == "app" else tables["providers"][name])[key] = value

    def read() -> object:
        parsed = parse(tables)
        return parsed.template("kit", plugins) if table == "app" else parsed.provider_options(name, plugins)

    expect_key_refused(path, key, value, model, read)
