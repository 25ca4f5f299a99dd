"""Finds and loads plugins.

A plugin is a module (or object) under the entry-point group `dispatcher.plugins`; the entry point has the name of
the provider or authenticator, and registers that name only.  Built-in plugins are loaded the same way.  Only
configured plugins are imported, so another one that is broken or slow has no effect.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import logging
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distributions, requires
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel

from dispatcher import __version__
from dispatcher.common import process_state
from dispatcher.common.contained import PluginRef, at_once, bounded, text
from dispatcher.config.messages import did_you_mean
from dispatcher.plugin import authenticator, hooks, provider
from dispatcher.plugin.authenticator import Authenticator, BaseAuthenticator, WebAuthenticator
from dispatcher.plugin.errors import PluginError
from dispatcher.plugin.model import Isolation
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import Provider

GROUP = "dispatcher.plugins"
DISTRIBUTION = "agent-dispatcher"
#: Names of plugins that are parts of this program and have no entry point.
BUILT_IN = frozenset({"local", "dispatcher-metrics", "dispatcher-log"})
AUTHENTICATORS = (Authenticator, WebAuthenticator)
UNKNOWN = "an unknown distribution"
MAX_CLASSES = 100  # that a hook may return
_T = TypeVar("_T")
_log = logging.getLogger("dispatcher.plugin")
#: What the dynamic linker says of a missing library; Debian names packages by it (Debian Policy 8.1).
_LIBRARY = re.compile(r"([\w+.-]+)\.so\.([\d.]+): cannot open shared object file")


def distribution(entry: EntryPoint) -> str:
    """Return ``NAME VERSION`` of the distribution that declares an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else UNKNOWN


def installed() -> list[EntryPoint]:
    """Return the entry points of all installed plugins.

    A distribution whose metadata cannot be read, which may have nothing to do with dispatcher, is left out and
    logged.  Of distributions with plugins and of one name, the first on `sys.path` counts.
    """
    found: dict[str, list[EntryPoint]] = {}
    for dist in distributions():
        try:
            entries = list(dist.entry_points.select(group=GROUP))
            if entries:
                metadata = dist.metadata  # from Python 3.12 on, asking for a missing field is deprecated
                if not all(field in metadata and metadata[field] for field in ("Name", "Version")):
                    raise ValueError("it has no name or version")
                found.setdefault(canonical(dist.name), entries)
        except Exception as error:
            _report_damaged(dist, error)
    return list(itertools.chain.from_iterable(found.values()))


def canonical(name: str) -> str:
    """Return a distribution's name in the form in which names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.lru_cache
def _say_once(path: str, why: str) -> None:
    _log.warning(
        "The metadata in %s cannot be read, plugins of that distribution are left out: %s; "
        "reinstall it, or delete that directory",
        *(path, why),
    )


def _report_damaged(dist: Distribution, error: Exception) -> None:
    _say_once(str(getattr(dist, "_path", dist.locate_file(""))), f"{type(error).__name__}: {text(error, 300)}")


def _of(origin: str) -> str:
    return f" of {origin}" if origin else ""


@dataclass(frozen=True)
class _Entry:
    """An entry point, with its distribution as it was when it was found: the files may change later."""

    point: EntryPoint
    distribution: str

    @property
    def key(self) -> tuple[str, str]:
        """The same for two that are one and the same."""
        return self.point.value, self.distribution

    @property
    def package(self) -> str:
        """The top-level package or module that it names."""
        return self.point.value.partition(":")[0].strip().partition(".")[0]


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _import(name: str, entry: _Entry) -> object:
    """Import a plugin; it may raise anything, or hang."""
    ref = PluginRef("plugin", name, entry.distribution)
    if not EntryPoint.pattern.match(entry.point.value):
        raise PluginError(
            f"The entry point {name!r}{_of(ref.distribution)} names no module",
            why=f"found {printable(entry.point.value)}, expected MODULE or MODULE:OBJECT",
            fix=ref.report,
        )

    def load() -> object:
        try:
            return entry.point.load()
        except BaseException as error:
            raise _not_importable(ref, error) from error

    return bounded(ref, "its import", load, log=None)


def _not_importable(ref: PluginRef, error: BaseException) -> PluginError:
    what = f"The plugin {ref.name!r}{_of(ref.distribution)} cannot be imported"
    if library := _LIBRARY.match(text(error, 300)):
        name, version = library[1], library[2]
        package = f"{name}{'-' if name[-1].isdigit() else ''}{version}".lower().replace("_", "-")
        return PluginError(
            what,
            why=f"the library {name}.so.{version} is not installed",
            fix=f"install it, then restart the manager (Debian, Ubuntu: usually apt install {package})",
        )
    if not isinstance(error, ModuleNotFoundError):
        return PluginError(what, why=f"{type(error).__name__}: {text(error, 300)}", fix=ref.report)
    needed = _requirements(ref.name, ref.distribution.split(" ", maxsplit=1)[0])
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
    """Refuse a plugin that implements a hook which does not exist, or one that would never run."""
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            known = sorted(hook for hook, other in vars(manager.hook).items() if other.has_spec())
            raise PluginError(
                f"The plugin {name!r}{_of(origin)} implements an unknown hook {caller.name!r}",
                fix=did_you_mean(caller.name, known, f"use one of {', '.join(known)}"),
            )
        for each in caller.get_hookimpls():
            if each.wrapper or each.hookwrapper:
                raise PluginError(
                    f"The plugin {name!r}{_of(origin)} wraps the hook {caller.name!r}",
                    why="each plugin is called alone: there is nothing to wrap",
                    fix="write `@hookimpl` without `wrapper`",
                )
            if _asynchronous(each.function):
                raise PluginError(
                    f"The plugin {name!r}{_of(origin)} implements the hook {caller.name!r} as a coroutine",
                    why="the manager calls hooks in threads, and awaits nothing",
                    fix="write `def` in place of `async def`",
                )
            if caller.name == "dispatcher_agent_event" and inspect.isgeneratorfunction(each.function):
                raise PluginError(
                    f"The plugin {name!r}{_of(origin)} implements the hook {caller.name!r} as a generator",
                    why="its result is not used, so nothing of it would run",
                    fix="write it without `yield`",
                )


def _asynchronous(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


@dataclass(frozen=True)
class _Found:
    """The classes of one plugin."""

    provider: type[Provider] | None
    authenticator: type[BaseAuthenticator] | None


def _check_version(version: object, what: str, contract: str, accepted: range, ref: PluginRef) -> None:
    """Refuse a class that follows another version of its contract; warn of one that follows an old version.

    docs/reference/plugin.md has the policy.
    """
    plugin = ref.distribution.split(" ")[0] or f"the distribution of the plugin {ref.name}"
    number = version if type(version) is int else None
    shown = printable(version) if number is None else number
    written = f"{what} is written for version {shown} of the {contract} contract"
    newest = accepted[-1]
    if number in accepted:
        if number != newest:
            _log.warning(
                "%s; %s %s still accepts it, and prefers version %s: upgrade %s",
                *(written, DISTRIBUTION, __version__, newest, plugin),
            )
        return
    upgrade, keep = (DISTRIBUTION, plugin) if number and number > newest else (plugin, DISTRIBUTION)
    raise PluginError(
        written,
        why=f"{DISTRIBUTION} {__version__} accepts version{_versions(accepted)}",
        fix=f"upgrade {upgrade}, or install another release of {keep}",
    )


def _versions(accepted: range) -> str:
    first, *more = accepted
    return f"s {first} to {more[-1]}" if more else f" {first}"


def _check_class(candidate: Any, bases: tuple[type, ...], accepted: range, ref: PluginRef) -> None:
    what = f"{getattr(candidate, '__qualname__', printable(candidate))}{_of(ref.distribution)}"
    if not (inspect.isclass(candidate) and issubclass(candidate, bases)):
        wanted = " or ".join(base.__name__ for base in bases)
        raise PluginError(f"{what} is not a subclass of dispatcher's {wanted}", fix=ref.report)
    if inspect.isabstract(candidate):
        missing = ", ".join(sorted(getattr(candidate, "__abstractmethods__", ())))
        raise PluginError(f"{what} is incomplete", why=f"it does not implement {missing}", fix=ref.report)
    if not isinstance(getattr(candidate, "name", None), str):
        raise PluginError(f"{what} has no name", fix="set the class attribute `name`")
    _check_version(getattr(candidate, "api_version", None), what, bases[0].__name__.lower(), accepted, ref)
    if Provider in bases and not isinstance(getattr(candidate, "isolation", None), Isolation):
        raise PluginError(
            f"{what} has no isolation",
            why=f"found {printable(getattr(candidate, 'isolation', None))}",
            fix="set the class attribute `isolation` to a member of dispatcher.plugin.Isolation",
        )
    for options in ("Options", *(("AppOptions",) if Provider in bases else ())):
        model = getattr(candidate, options, None)
        if not (inspect.isclass(model) and issubclass(model, BaseModel)):
            raise PluginError(f"{what} has no {options}", fix=f"set `{options}` to a pydantic model")


class Plugins:
    """The plugins of one process.

    :param entries: the entry points to choose from; by default those installed.
    """

    def __init__(self, entries: Iterable[EntryPoint] | None = None) -> None:
        self._given = None if entries is None else list(entries)
        self._entries = self._find()
        self._manager = _manager()
        self._in_use: dict[str, _Entry] = {}
        self._loaded: dict[str, str] = {}
        self._refused: dict[str, PluginError] = {}
        self._added: dict[str, set[str]] = {}  # modules that the import of a refused plugin has added
        self._providers: dict[str, type[Provider]] = {}
        self._authenticators: dict[str, type[BaseAuthenticator]] = {}
        self._lock = threading.Lock()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # one plugin is loaded once

    def _find(self) -> dict[str, list[_Entry]]:
        found: defaultdict[str, list[_Entry]] = defaultdict(list)
        for point in installed() if self._given is None else self._given:
            entry, known = _Entry(point, distribution(point)), found[point.name]
            if entry.key not in {other.key for other in known}:
                known.append(entry)
        return dict(found)

    @property
    def hook(self) -> pluggy.HookRelay:
        """The hooks of all loaded plugins."""
        return self._manager.hook

    def available(self) -> dict[str, str]:
        """Return the name of every plugin that is installed or in use, with its distribution."""
        found = {name: found[0] for name, found in self._entries.items()} | self._in_use
        return {name: entry.distribution for name, entry in sorted(found.items())}

    def ref(self, kind: str, name: str) -> PluginRef:
        """Return how errors name a plugin, or one of several authenticators of a plugin (``PLUGIN.NAME``)."""
        plugin = name.partition(".")[0] if kind == "authenticator" else name
        origin = self._loaded.get(plugin) or self.available().get(plugin, "")
        return PluginRef(kind, name, "" if origin == UNKNOWN else origin)

    def kinds(self, name: str) -> list[str]:
        """Return what a loaded plugin is: provider, authenticator, observer."""
        plugin = self._manager.get_plugin(name)
        observers = {each.plugin_name for each in self.hook.dispatcher_agent_event.get_hookimpls()}
        found = {
            "provider": name in self._providers,
            "authenticator": name in self._authenticators,
            "observer": plugin is not None and name in observers,
        }
        return [kind for kind, is_one in found.items() if is_one]

    def load(self, name: str) -> None:
        """Import and register a plugin; loading it again does nothing, or raises the same error.

        :raises PluginError: not installed, declared twice, not importable, hanging, or as `register`.
        """
        with self.guarded([name]):
            self._load(name)

    def _load(self, name: str) -> None:
        with self._lock:
            lock = self._locks[name]
        with lock:
            if name in self._loaded:
                return
            if name in self._refused:
                raise self._refused[name].with_traceback(None)
            entry, before = self._entry(name), set(sys.modules)
            try:
                if name in BUILT_IN:
                    raise PluginError(
                        f"The plugin {name!r} of {entry.distribution} is refused",
                        why="the name belongs to a part of dispatcher",
                        fix="rename its entry point, or uninstall it",
                    )
                self.register(name, _import(name, entry), entry.distribution)
                self._in_use[name] = entry
            except PluginError as error:
                self._refused[name] = error
                self._added[name] = {each for each in sys.modules.keys() - before if _within(each, entry.package)}
                raise

    def load_all(self, names: Iterable[str]) -> None:
        """Load plugins at the same time; why one cannot be is said when it is needed."""

        def load(name: str) -> None:
            with suppress(PluginError):
                self._load(name)

        found = [name for name in names if name in self._entries]
        with self.guarded(found):
            at_once(functools.partial(load, name) for name in found)

    @contextmanager
    def guarded(self, names: Iterable[str]) -> Iterator[None]:
        """Set back what the block changes of the whole process, where plugins are imported or made; log it."""
        try:
            with process_state.unchanged() as changed:
                yield
        finally:
            if changed:
                loaded = [f"{name}{_of(self.ref('plugin', name).distribution)}" for name in names]
                _log.warning(
                    "%s %s changed the whole process: %s; it is set back (report this fault to the authors)",
                    "The plugin" if len(loaded) == 1 else "One of the plugins",
                    ", ".join(loaded),
                    ", ".join(changed),
                )

    def refusal(self, name: str) -> PluginError | None:
        """Return why a plugin was refused; None if it was not."""
        return self._refused.get(name)

    def refresh(self) -> list[str]:
        """Look again for what is installed; return in sentences which plugins in use have been replaced.

        Refused plugins are imported again when they are needed next: they may have been repaired.  Those in use
        stay as they are.
        """
        importlib.invalidate_caches()
        with self._lock:
            packages = {entry.package for entry in self._in_use.values()}
            for name in self._refused.keys() & self._entries.keys():
                if self._entries[name][0].package not in packages:
                    for module in self._added.pop(name, ()):
                        sys.modules.pop(module, None)
            self._refused.clear()
            self._entries = self._find()
        changed = []
        for name, entry in self._in_use.items():
            found = {each.distribution for each in self._entries.get(name, ())}
            if found != {entry.distribution}:
                now = f"installed as {' and '.join(sorted(found))}" if found else "no longer installed"
                changed.append(
                    f"The plugin {name} is in use as {entry.distribution}, and {now}: "
                    "this takes effect after a restart of the manager."
                )
        return changed

    def register(self, name: str, plugin: object, origin: str = "") -> None:
        """Register a plugin under its name: called by `load`, and for what has no entry point (built in, or in
        tests).

        A plugin is registered as a whole or not at all.

        :param origin: the distribution that errors name; "": this program.
        :raises PluginError: an unknown hook, a wrong class, a class of another name.
        """
        ref = PluginRef("plugin", name, origin)
        alone = _manager()  # calls the hooks of this plugin only; a refused plugin gets no events

        def collect() -> _Found:
            try:
                alone.register(plugin, name)
                if name in self._loaded or self._manager.is_registered(plugin):
                    raise ValueError("it is registered already")
            except (pluggy.PluginValidationError, ValueError) as error:
                raise PluginError(
                    f"The plugin {name!r}{_of(origin)} breaks a hook's contract", why=str(error), fix=ref.report
                ) from error
            _check_hooks(alone, name, plugin, origin)
            return _Found(
                self._collect(alone, "providers", (Provider,), provider.API_VERSIONS, ref),
                self._collect(alone, "authenticators", AUTHENTICATORS, authenticator.API_VERSIONS, ref),
            )

        found = bounded(ref, "its hooks", collect, log=None) if origin else collect()
        with self._lock:
            self._manager.register(plugin, name)
            self._providers.update({name: found.provider} if found.provider else {})
            self._authenticators.update({name: found.authenticator} if found.authenticator else {})
            self._loaded[name] = origin

    def provider(self, name: str) -> type[Provider]:
        """Return the provider class called `name`, its plugin loaded.

        :raises PluginError: as `load`, or its plugin registers no provider.
        """
        return self._class(name, self._providers, "provider")

    def authenticator(self, name: str) -> type[BaseAuthenticator]:
        """Return the authenticator class called `name`, its plugin loaded.

        :raises PluginError: as `load`, or its plugin registers no authenticator.
        """
        return self._class(name, self._authenticators, "authenticator")

    def _class(self, name: str, known: dict[str, type[_T]], what: str) -> type[_T]:
        if name not in known:
            self.load(name)
        if name not in known:
            kinds = " and ".join(self.kinds(name))
            raise PluginError(
                f"The plugin {name!r}{_of(self._loaded[name])} registers no {what}",
                why=f"it registers: {kinds}" if kinds else "it implements none of the hooks",
                fix=f"choose the plugin of another {what}",
            )
        return known[name]

    def _entry(self, name: str) -> _Entry:
        found = self._entries.get(name, [])
        if len(found) > 1:
            both = " and ".join(f"{entry.point.value} of {entry.distribution}" for entry in found)
            raise PluginError(f"The plugin name {name!r} is declared twice", why=both, fix="uninstall one of them")
        if not found:
            raise PluginError(
                f"There is no plugin {printable(name)}",
                why="installed are: " + (", ".join(sorted(self._entries)) or "none"),
                fix=did_you_mean(name, self._entries, "install the distribution that provides it"),
            )
        return found[0]

    def _collect(
        self, manager: pluggy.PluginManager, kind: str, bases: tuple[type, ...], accepted: range, ref: PluginRef
    ) -> Any:
        """Call a hook; return the class of the plugin's own name that it returns."""
        hook = f"dispatcher_register_{kind}"
        try:
            returned = itertools.chain.from_iterable(getattr(manager.hook, hook)())
            classes = list(itertools.islice(returned, MAX_CLASSES + 1))
        except ImportError as error:  # plugins may import their libraries when the hook is called
            raise _not_importable(ref, error) from error
        except BaseException as error:
            raise PluginError(
                f"{hook}{_of(ref.distribution)} failed",
                why=f"{type(error).__name__}: {text(error, 300)}",
                fix=ref.report,
            ) from error
        for cls in classes:
            _check_class(cls, bases, accepted, ref)
            if cls.name != ref.name:
                raise self._wrong_name(cls, kind.removesuffix("s"), ref)
        if len(classes) > 1:
            raise PluginError(
                f"The plugin {ref.name!r}{_of(ref.distribution)} registers several classes",
                why=hook,
                fix=ref.report,
            )
        return classes[0] if classes else None

    def _wrong_name(self, cls: Any, kind: str, ref: PluginRef) -> PluginError:
        owner = self.available().get(cls.name) or (DISTRIBUTION if cls.name in BUILT_IN else "")
        taken = f"; {cls.name!r} is the {kind} of {owner}" if owner else ""
        return PluginError(
            f"{cls.__qualname__}{_of(ref.distribution)} calls itself {printable(cls.name)}",
            why=f"the entry point {ref.name!r} registers the name {ref.name!r} and no other{taken}",
            fix=f"uninstall {ref.distribution.split(' ')[0]}, or let entry point and class have one name",
        )
