"""Tier *plugin*: entry point, hook and class, before anything is called.  No opt-out but for the entry point."""

from __future__ import annotations

import inspect
import time
from types import ModuleType

import pytest

from dispatcher.config.plugins import Plugins
from dispatcher.plugin import hooks, names
from dispatcher.plugin.errors import BadRequest, PluginError
from dispatcher.plugin.provider import Provider
from dispatcher.testing.base import Contract, needs_no
from dispatcher.testing.declared import expect_declared_once, expect_hook_returns_class
from dispatcher.testing.driver import expect


class PluginChecks(Contract, page="docs/reference/hooks.md"):
    """The tests use the class that the manager loads."""

    @needs_no("no_entry_point")
    def test_entry_point_is_declared_once(self, provider: Provider) -> None:
        """One installed distribution declares an entry point of the provider's name."""
        expect_declared_once(provider.name, type(provider).__module__)

    @needs_no("no_entry_point")
    def test_hook_returns_the_class(self, provider: Provider) -> None:
        """The module of the entry point has the hook `dispatcher_register_providers`, which returns this class."""
        expect_hook_returns_class(Plugins().provider, provider.name, type(provider), "provider")

    def test_class_is_accepted_by_the_loader(self, provider: Provider) -> None:
        """The plugin loader accepts the class: name, version of the contract, option models, nothing abstract."""
        cls = type(provider)
        try:
            load(cls)
        except PluginError as error:
            pytest.fail(f"the plugin loader refuses {cls.__name__}: {error}")
        try:
            names.app_name(cls.name)
        except BadRequest as error:
            pytest.fail(f"{cls.__name__}.name is {cls.name!r}: {error.why}")

    def test_signatures_are_the_contract(self, provider: Provider) -> None:
        """Every method takes the contract's arguments under the contract's names."""
        for name, declared in inspect.getmembers(Provider, inspect.isfunction):
            if name.startswith("_"):
                continue
            own = inspect.signature(getattr(type(provider), name)).parameters
            missing = [argument for argument in inspect.signature(declared).parameters if argument not in own]
            open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own.values())
            expect(
                not missing or open_ended,
                f"{name}() does not take {', '.join(missing)}: keep the contract's names",
            )

    def test_init_does_not_connect(self, provider: Provider) -> None:
        """`__init__` only keeps its arguments: the manager makes providers whose backend is down."""
        began = time.monotonic()
        self.drive_another(provider).close()
        expect(
            time.monotonic() - began < 1.0,
            f"making and closing {type(provider).__name__} takes over a second: connect in check() or later",
        )


def load(cls: type[Provider]) -> Plugins:
    """Return plugins with this one alone.

    :raises PluginError: the loader refuses it.
    """
    plugins = Plugins(())
    plugin = ModuleType("plugin")
    vars(plugin)["dispatcher_register_providers"] = hooks.hookimpl(lambda: [cls])
    name = cls.name if isinstance(getattr(cls, "name", None), str) else "nameless"
    plugins.register(name, plugin, cls.__module__)
    return plugins
