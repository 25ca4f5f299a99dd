"""What must hold before anybody signs in: entry point, hook, class, options."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from dispatcher.common.contained import PluginRef
from dispatcher.config.messages import validate
from dispatcher.config.plugins import BUILT_IN, Plugins
from dispatcher.plugin import hooks, names
from dispatcher.plugin.authenticator import Authenticator, BaseAuthenticator
from dispatcher.plugin.errors import BadRequest, PluginError
from dispatcher.testing.authenticator.asker import in_time
from dispatcher.testing.authenticator.base import AuthenticatorBase
from dispatcher.testing.base import needs_no
from dispatcher.testing.declared import (
    expect_declared_once,
    expect_hook_returns_class,
    expect_key_refused,
    expect_signatures,
)
from dispatcher.testing.driver import expect


class DeclarationChecks(AuthenticatorBase):
    """Entry point, hook, class, options."""

    @needs_no("no_entry_point")
    def test_entry_point_is_declared_once(self, authenticator: Authenticator) -> None:
        """One installed distribution declares an entry point of the authenticator's name."""
        expect_declared_once(authenticator.name, type(authenticator).__module__)

    @needs_no("no_entry_point")
    def test_hook_returns_the_class(self, authenticator: Authenticator) -> None:
        """The module of the entry point has the hook, which returns this class."""
        expect_hook_returns_class(
            Plugins().authenticator, authenticator.name, type(authenticator), "authenticator"
        )

    def test_class_is_accepted_by_the_loader(self, authenticator: Authenticator) -> None:
        """The plugin loader accepts the class: name, version of the contract, options, nothing abstract."""
        try:
            load(type(authenticator))
        except PluginError as error:
            pytest.fail(f"the plugin loader refuses {type(authenticator).__name__}: {error}")

    def test_name_is_legal(self, authenticator: Authenticator) -> None:
        """The name can be used in the configuration, and is not the name of a part of the core."""
        name = authenticator.name
        try:
            names.app_name(name)
        except BadRequest as error:
            pytest.fail(f"{type(authenticator).__name__}.name is {name!r}: {error.why}")
        expect(
            self.no_entry_point or name not in BUILT_IN,
            f"{type(authenticator).__name__}.name is {name!r}, which is a part of dispatcher: choose another",
        )

    def test_signatures_are_the_contract(self, authenticator: Authenticator) -> None:
        """Every method takes the contract's arguments under the contract's names, and none is a coroutine."""
        expect_signatures(type(authenticator), Authenticator)

    def test_unknown_option_is_refused_with_its_path(self, authenticator: Authenticator) -> None:
        """A misspelt key of ``[auth.NAME]`` is an error that names its full path."""
        _expect_refused(authenticator, "kit-misspelt", 1)

    def test_wrong_type_is_refused_with_its_path(self, authenticator: Authenticator) -> None:
        """A value of a wrong type is an error that names its full path, for every key."""
        for key, field in type(authenticator).Options.model_fields.items():
            _expect_refused(authenticator, field.alias or key, [{"never": [None]}, 3.5])

    def test_init_does_not_connect(self, authenticator: Authenticator) -> None:
        """`__init__` only keeps its options: the manager makes authenticators whose directory is down."""
        answer = in_time(
            f"{type(authenticator).__name__}()", lambda: self.another(authenticator), 1.0, self.patience
        )
        expect(answer.error is None, f"{type(authenticator).__name__}() {answer}: connect in authenticate()")
        expect(
            answer.seconds < 1.0,
            f"{type(authenticator).__name__}() takes {answer.seconds:.1f} s: connect in authenticate()",
        )
        assert isinstance(answer.value, Authenticator)
        answer.value.close()

    def test_close_can_be_repeated(self, authenticator: Authenticator) -> None:
        """`close` works before the first call of `authenticate`, and a second time."""
        other = self.another(authenticator)
        for _ in range(2):
            answer = in_time("close()", other.close, self.patience, self.slack)
            expect(answer.error is None, f"close() {answer}: close what there is, and nothing twice")


def load(cls: type[BaseAuthenticator]) -> Plugins:
    """Return plugins with this one alone.

    :raises PluginError: the loader refuses it.
    """
    plugins, plugin = Plugins(()), ModuleType("plugin")
    vars(plugin)["dispatcher_register_authenticators"] = hooks.hookimpl(lambda: [cls])
    plugins.register(cls.name if isinstance(getattr(cls, "name", None), str) else "nameless", plugin, "")
    return plugins


def _expect_refused(authenticator: Authenticator, key: str, value: Any) -> None:
    __tracebackhide__ = True
    path, model = f"auth.{authenticator.name}", type(authenticator).Options
    table = authenticator.options.model_dump(mode="json", by_alias=True, exclude_none=True) | {key: value}
    ref = PluginRef("authenticator", authenticator.name)
    expect_key_refused(path, key, value, "Options", lambda: validate(ref, model, table, path))
