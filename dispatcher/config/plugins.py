"""Finds and loads plugins.

A plugin is a module (or object) under the entry-point group `dispatcher.plugins`; the entry point has the name of
the provider or authenticator.  Built-in plugins are loaded the same way.  Only configured plugins are imported, so
another one that is broken or slow has no effect.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel

from dispatcher.config.messages import did_you_mean
from dispatcher.plugin import authenticator, hooks, provider
from dispatcher.plugin.authenticator import Authenticator
from dispatcher.plugin.errors import PluginError
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import Provider

GROUP = "dispatcher.plugins"
_T = TypeVar("_T")


def distribution(entry: EntryPoint) -> str:
    """Return ``NAME VERSION`` of the distribution that declares an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _not_importable(name: str, origin: str, error: BaseException) -> PluginError:
    what = f"The plugin {name!r} of {origin} cannot be imported"
    if not isinstance(error, ModuleNotFoundError):
        return PluginError(
            what, why=f"{type(error).__name__}: {error}", fix="report this to the author of the plugin"
        )
    needed = _requirements(name, origin.split(" ", maxsplit=1)[0])
    packages = " ".join(map(repr, needed)) or f"PACKAGE, the one that provides the module {error.name}"
    return PluginError(
        what,
        why=f"the Python module {error.name} is not installed",
        fix=f"{sys.executable} -m pip install {packages}",
    )


def _requirements(extra: str, distribution: str) -> list[str]:
    """Return what an extra of an installed distribution requires."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return []
    parts = [line.partition(";") for line in lines]
    return [
        need.strip()
        for need, _, marker in parts
        if marker.strip() in {f"extra == '{extra}'", f'extra == "{extra}"'}
    ]


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hooks.NAMESPACE)
    manager.add_hookspecs(hooks)
    return manager


def _check_hooks(manager: pluggy.PluginManager, name: str, plugin: object, origin: str) -> None:
    """Refuse a plugin that implements a hook which does not exist."""
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            known = sorted(hook for hook, other in vars(manager.hook).items() if other.has_spec())
            raise PluginError(
                f"The plugin {name!r} of {origin} implements an unknown hook {caller.name!r}",
                fix=did_you_mean(caller.name, known, f"use one of {', '.join(known)}"),
            )


class Plugins:
    """The plugins of one process.

    :param entries: the entry points to choose from; by default those installed.
    """

    def __init__(self, entries: Iterable[EntryPoint] | None = None) -> None:
        self._entries: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=GROUP) if entries is None else entries:
            known = self._entries.setdefault(entry.name, [])
            if all((entry.value, distribution(entry)) != (other.value, distribution(other)) for other in known):
                known.append(entry)
        self._manager = _manager()
        self._loaded: dict[str, str] = {}
        self._providers: dict[str, type[Provider]] = {}
        self._authenticators: dict[str, type[Authenticator]] = {}

    @property
    def hook(self) -> pluggy.HookRelay:
        """The hooks of all loaded plugins."""
        return self._manager.hook

    def available(self) -> dict[str, str]:
        """Return the name of every installed plugin with its distribution."""
        return {name: distribution(found[0]) for name, found in sorted(self._entries.items())}

    def load(self, name: str) -> None:
        """Import and register a plugin; loading it again does nothing.

        :raises PluginError: not installed, declared twice, not importable, or as `register`.
        """
        if name in self._loaded:
            return
        entry = self._entry(name)
        origin = distribution(entry)
        try:
            plugin = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise anything
            raise _not_importable(name, origin, error) from error
        self.register(name, plugin, origin)

    def register(self, name: str, plugin: object, origin: str = "this program") -> None:
        """Register a plugin: called by `load`, and for what has no entry point (built in, or in tests).

        :param origin: the distribution that errors name.
        :raises PluginError: an unknown hook, a wrong class, a name that is taken.
        """
        alone = _manager()  # calls the hooks of this plugin only; a refused plugin gets no events
        try:
            alone.register(plugin, name)
            if name in self._loaded or self._manager.is_registered(plugin):
                raise ValueError("it is registered already")
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(
                f"The plugin {name!r} of {origin} breaks a hook's contract", why=str(error)
            ) from error
        _check_hooks(alone, name, plugin, origin)
        hook = hooks.dispatcher_register_providers.__name__
        self._collect(alone, hook, Provider, provider.API_VERSION, self._providers, origin)
        hook = hooks.dispatcher_register_authenticators.__name__
        self._collect(alone, hook, Authenticator, authenticator.API_VERSION, self._authenticators, origin)
        self._manager.register(plugin, name)
        self._loaded[name] = origin

    def provider(self, name: str) -> type[Provider]:
        """Return the provider class called `name`, its plugin loaded.

        :raises PluginError: as `load`, or its plugin registers no provider of that name.
        """
        return self._class(name, self._providers, "provider")

    def authenticator(self, name: str) -> type[Authenticator]:
        """Return the authenticator class called `name`, its plugin loaded.

        :raises PluginError: as `load`, or its plugin registers no authenticator of that name.
        """
        return self._class(name, self._authenticators, "authenticator")

    def _class(self, name: str, known: dict[str, type[_T]], what: str) -> type[_T]:
        if name not in known:
            self.load(name)
        if name not in known:
            raise PluginError(f"The plugin {name!r} of {self._loaded[name]} registers no {what} called {name!r}")
        return known[name]

    def _entry(self, name: str) -> EntryPoint:
        found = self._entries.get(name, [])
        if len(found) > 1:
            both = " and ".join(f"{entry.value} of {distribution(entry)}" for entry in found)
            raise PluginError(f"The plugin name {name!r} is declared twice", why=both, fix="uninstall one of them")
        if not found:
            raise PluginError(
                f"There is no plugin {printable(name)}",
                why="installed are: " + (", ".join(sorted(self._entries)) or "none"),
                fix=did_you_mean(name, self._entries, "install the distribution that provides it"),
            )
        return found[0]

    def _collect(
        self,
        manager: pluggy.PluginManager,
        hook: str,
        base: Any,
        version: int,
        into: dict[str, Any],
        origin: str,
    ) -> None:
        """Call a hook and add the classes that it returns to `into`."""
        try:
            classes = [cls for returned in getattr(manager.hook, hook)() for cls in returned]
        except ImportError as error:  # plugins may import their libraries when the hook is called
            raise _not_importable(manager.list_name_plugin()[0][0], origin, error) from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(f"{hook} of {origin} failed", why=f"{type(error).__name__}: {error}") from error
        for cls in classes:
            self._check_class(cls, base, version, origin)
            if cls.name in into:
                raise PluginError(
                    f"{cls.name!r} is registered twice",
                    why=f"by {into[cls.name].__module__} and by {cls.__module__} of {origin}",
                    fix="uninstall one of them",
                )
            into[cls.name] = cls

    @staticmethod
    def _check_class(candidate: Any, base: type, version: int, origin: str) -> None:
        what = f"{getattr(candidate, '__qualname__', printable(candidate))} of {origin}"
        if not (inspect.isclass(candidate) and issubclass(candidate, base)):
            raise PluginError(f"{what} is not a subclass of dispatcher's {base.__name__}")
        if inspect.isabstract(candidate):
            missing = ", ".join(sorted(getattr(candidate, "__abstractmethods__", ())))
            raise PluginError(f"{what} is incomplete", why=f"it does not implement {missing}")
        if not isinstance(getattr(candidate, "name", None), str):
            raise PluginError(f"{what} has no name", fix="set the class attribute `name`")
        if getattr(candidate, "api_version", None) != version:
            raise PluginError(
                f"{what} is written for version {getattr(candidate, 'api_version', None)} of the contract",
                why=f"this program has version {version}",
                fix="install a matching release of the plugin",
            )
        for options in ("Options", *(("AppOptions",) if base is Provider else ())):
            model = getattr(candidate, options, None)
            if not (inspect.isclass(model) and issubclass(model, BaseModel)):
                raise PluginError(f"{what} has no {options}", fix=f"set `{options}` to a pydantic model")
