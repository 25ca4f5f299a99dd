"""Checks of an entry point and of options, the same for every kind of plugin."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from dispatcher.config.plugins import GROUP, distribution, installed
from dispatcher.plugin.errors import ConfigError, PluginError
from dispatcher.testing.driver import expect


def expect_declared_once(name: str, module: str) -> None:
    """Expect that one installed distribution declares the plugin.

    :param module: of the plugin, for the message.
    """
    __tracebackhide__ = True
    found = {(entry.value, distribution(entry)) for entry in installed() if entry.name == name}
    expect(
        found,
        f'no installed distribution declares the plugin {name!r}: write [project.entry-points."{GROUP}"] with '
        f'{name} = "{module}" into pyproject.toml, and `pip install` it',
    )
    expect(len(found) == 1, f"the plugin {name!r} is declared twice, {sorted(found)}: uninstall one of them")


def expect_hook_returns_class(find: Callable[[str], type], name: str, cls: type, fixture: str) -> None:
    """Expect that the entry point of a plugin leads to the class that the tests use.

    :param find: returns the class by the plugin's name; :param fixture: which made the instance of `cls`.
    """
    __tracebackhide__ = True
    try:
        found = find(name)
    except PluginError as error:
        pytest.fail(f"the plugin {name!r} does not load: {error}")
    expect(
        found is cls,
        f"the entry point leads to {found!r}, the fixture `{fixture}` to {cls!r}: test what is installed",
    )


def expect_key_refused(path: str, key: str, value: object, model: str, read: Callable[[], object]) -> None:
    """Expect that an option is refused, and that the error names its key.

    :param path: of its table; :param model: which should refuse it, for the message; :param read: reads the table.
    """
    __tracebackhide__ = True
    try:
        read()
    except ConfigError as error:
        expect(
            f"{path}.{key}" in str(error),
            f"the error for {path}.{key} does not name it ({error}): let pydantic report the key, and let "
            "validators raise ValueError",
        )
    else:
        pytest.fail(f'{path}.{key} = {value!r} was accepted: {model} must refuse it (extra="forbid", exact types)')


def expect_signatures(cls: type, contract: type) -> None:
    """Expect that every method of a contract takes the contract's arguments, and that none is a coroutine."""
    __tracebackhide__ = True
    for name, declared in inspect.getmembers(contract, inspect.isfunction):
        own = getattr(cls, name)
        expect(
            not inspect.iscoroutinefunction(own),
            f"{name}() is declared with `async`: the manager calls it in a thread of its own, write `def`",
        )
        given = inspect.signature(own).parameters
        missing = [argument for argument in inspect.signature(declared).parameters if argument not in given]
        open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in given.values())
        expect(
            not missing or open_ended, f"{name}() does not take {', '.join(missing)}: keep the contract's names"
        )
