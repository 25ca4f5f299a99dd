"""Where a key belongs that was written into another table: a hint for errors about unknown keys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from pydantic import BaseModel

from dispatcher.plugin.errors import DispatcherError

#: In commands and environments, see `dispatcher.plugin.provider`.
PLACEHOLDERS = ("socket", "port", "data")
_Tables = Iterable[tuple[str, type[BaseModel]]]


def hint(key: str, table: str, provider: str) -> str:
    """Return where a key is valid that is unknown in its table, as the rest of a sentence; "" if nowhere.

    :param table: such as ``apps.lab``; "" for the top of the file.
    :param provider: of that app, or of new apps.
    """
    first, *rest = table.split(".")
    if first not in {"apps", "defaults", "providers"}:
        return _named(key, table, _core()) or _named(key, table, _of_app("NAME", provider)) or _plugin(key, table)
    app = rest[0] if first == "apps" else "NAME"
    if first != "defaults" and len(rest) == (2 if first == "apps" else 1):
        provider = rest[-1]
    own = list(_of_app(app, provider))
    if found := _named(key, table, own):
        return found
    takes_command = own and own[0][0] == f"apps.{app}.{provider}" and "command" in own[0][1].model_fields
    if key in PLACEHOLDERS[:2] and takes_command:
        return f", the app gets it as {{{key}}} in its command"
    if found := _named(key, table, _of_others(app, provider)):
        return f"{found} with that provider"
    return _named(key, table, _core())


def _named(key: str, table: str, tables: _Tables) -> str:
    found = [f"[{name}]" if name else "the top of the file" for name, model in tables if key in model.model_fields]
    found = [name for name in found if name != f"[{table}]"]
    return f", it belongs in {' or '.join(found)}" if found else ""


def _core() -> Iterator[tuple[str, type[BaseModel]]]:
    from dispatcher.config import load

    for name in ("manager", "proxy", "auth", "defaults"):
        model = load.Config.model_fields[name].annotation
        assert isinstance(model, type)
        yield name, model
    yield "", load.Config


def _of_app(app: str, provider: str) -> Iterator[tuple[str, type[BaseModel]]]:
    from dispatcher.config.plugins import Plugins
    from dispatcher.config.schema import AppConfig

    with contextlib.suppress(DispatcherError):
        cls = Plugins().provider(provider)
        yield f"apps.{app}.{provider}", cls.AppOptions
        yield f"providers.{provider}", cls.Options
    yield f"apps.{app}", AppConfig


def _of_others(app: str, provider: str) -> Iterator[tuple[str, type[BaseModel]]]:
    from dispatcher.config.plugins import DISTRIBUTION, Plugins

    plugins = Plugins()
    for name, distribution in plugins.available().items():
        if name == provider or distribution.split(" ")[0] != DISTRIBUTION:
            continue  # nothing uses it: a third party's code does not run for the sake of a hint
        with contextlib.suppress(DispatcherError):
            yield f"apps.{app}.{name}", plugins.provider(name).AppOptions


def _plugin(key: str, table: str) -> str:
    from dispatcher.config.plugins import Plugins

    known = not table and key in Plugins().available()
    return f", it belongs in [providers.{key}] or [apps.NAME.{key}]" if known else ""
