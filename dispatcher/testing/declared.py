"""Checks of an entry point, the same for every kind of plugin."""

from __future__ import annotations

from importlib.metadata import entry_points

from dispatcher.config.plugins import GROUP, distribution
from dispatcher.testing.driver import expect


def expect_declared_once(name: str, module: str) -> None:
    """Expect that one installed distribution declares the plugin.

    :param module: of the plugin, for the message.
    """
    __tracebackhide__ = True
    found = {(entry.value, distribution(entry)) for entry in entry_points(group=GROUP) if entry.name == name}
    expect(
        found,
        f'no installed distribution declares the plugin {name!r}: write [project.entry-points."{GROUP}"] with '
        f'{name} = "{module}" into pyproject.toml, and `pip install` it',
    )
    expect(len(found) == 1, f"the plugin {name!r} is declared twice, {sorted(found)}: uninstall one of them")
