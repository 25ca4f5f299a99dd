"""Turns pydantic's errors into messages for an operator.

Each names the key's full path, the value found, the value expected and the nearest valid key.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dispatcher.common.contained import PluginRef, bounded
from dispatcher.common.nearest import nearest as nearest_name
from dispatcher.common.redact import is_secret
from dispatcher.config import misplaced
from dispatcher.config.schema import AppDefaults
from dispatcher.plugin import names
from dispatcher.plugin.errors import ConfigError

#: The expected value for each kind of pydantic error.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text in quotes",
    "path_type": "a path in quotes",
    "list_type": "a list in square brackets",
    "tuple_type": "a list in square brackets",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "mapping_type": "a table",
}
#: The same for kinds with a value of their own: its name, and the words around it.
_BOUNDS = {
    "greater_than": ("gt", "more than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
    "multiple_of": ("multiple_of", "a multiple of {}"),
    "string_too_short": ("min_length", "a text with a length of at least {}"),
    "string_too_long": ("max_length", "a text with a length of at most {}"),
    "string_pattern_mismatch": ("pattern", "a text that matches {}"),
    "too_short": ("min_length", "a length of at least {}"),
    "too_long": ("max_length", "a length of at most {}"),
}
#: Keys of comparable programs.
_SYNONYMS = {
    "address": "listen",
    "bind": "listen",
    "cert": "tls_cert",
    "cpu": "cpus",
    "env": "environment",
    "host": "listen",
    "key": "tls_key",
    "port": "listen",
    "url": "public_url",
}


def validate(
    plugin: PluginRef, model: type[BaseModel], data: Mapping[str, Any], path: str = "", file: Path | None = None
) -> BaseModel:
    """Return `data` as a plugin's `model`.

    :param path: the key of `data` in the file; :param file: the file, for the error.
    :raises ConfigError: names every error; :raises PluginError: the model raised anything else, or hangs.
    """

    def run() -> BaseModel:
        try:
            return model.model_validate(data)
        except ValidationError as error:
            raise wrong(problems(model, error, path), file) from error

    return bounded(plugin, f"the validation of {path}", run, log=None, secret=True)


def wrong(found: Iterable[str], file: Path | None = None) -> ConfigError:
    """Return an error with these problems, each once; `details` holds them as a list."""
    each = list(dict.fromkeys(found))
    what = "The configuration is not valid" if file is None else f"{file} is wrong"
    return ConfigError(what, why="; ".join(each), details={"problems": each})


def problems(
    model: type[BaseModel],
    error: ValidationError,
    path: str = "",
    *,
    skip: Callable[[tuple[str | int, ...]], bool] = lambda _: False,
) -> list[str]:
    """Return a message for each pydantic error, except where `skip` is true of its location."""
    return [_problem(model, item, path) for item in error.errors(include_url=False) if not skip(item["loc"])]


def unknown_key(table: str, key: str, model: type[BaseModel] | None, provider: str) -> str:
    """Return the message about a key that its table does not have.

    :param table: its path in the file; :param provider: of its app, or of new apps.
    """
    full = ".".join([*([table] if table else []), printable_key(key)])
    synonym = model is not None and _SYNONYMS.get(key) in model.model_fields
    return f"{full}: unknown key{(not synonym and misplaced.hint(key, table, provider)) or nearest(key, model)}"


def nearest(key: str, model: type[BaseModel] | None) -> str:
    """Return the nearest valid key of a table as a hint, else all valid keys."""
    if model is None:
        return ""
    if (other := _SYNONYMS.get(key)) in model.model_fields:
        return f", did you mean {other!r}?"
    known = sorted(model.model_fields)
    return f", {did_you_mean(key, known, 'valid are: ' + (', '.join(known) or 'none'))}"


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return a question with the nearest of the known words, or `otherwise`."""
    near = nearest_name(word, known)
    return f"did you mean {near!r}?" if near else otherwise


def shown(value: object, key: str = "") -> str:
    """Return a value in TOML notation, cut and escaped; a secret is replaced."""
    if is_secret(key) and value not in (None, ""):
        return "a secret"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return names.printable(json.dumps(value, default=str))[1:-1]
    return names.printable(value)


def _problem(model: type[BaseModel], item: Any, path: str) -> str:
    where = [str(part) for part in item["loc"] if not _is_union_tag(str(part))]
    full = ".".join([*([path] if path else []), *map(printable_key, where)]) or "the file"
    kind, context = item["type"], item.get("ctx") or {}
    if kind == "extra_forbidden":
        table = full.removesuffix(printable_key(where[-1])).removesuffix(".")
        return unknown_key(table, where[-1], _model_at(model, where[:-1]), AppDefaults().provider)
    if kind == "missing" and not (where and where[-1].isdigit()):
        return f"{full}: is missing"
    if kind == "missing":
        return f"{full}: is missing, expected one more element of the list"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if (
        kind == "value_error"
        and isinstance(item["input"], (dict, BaseModel))
        and not message.startswith("names of")
    ):
        return f"{full}: {message}"
    expected = _EXPECTED.get(kind, message)
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        expected = words.format(context.get(name))
    # What stands in the place of a secret's source may be the secret itself.
    in_secrets = len(where) > 1 and where[-2] == "secrets" and item["loc"][-1] != "[key]"
    key = "secret" if in_secrets else where[-1] if where else ""
    return f"{full}: found {shown(item['input'], key)}, expected {expected}"


def printable_key(part: str) -> str:
    """Return a key in TOML notation, quoted if necessary."""
    return part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else names.printable(part)


def _is_union_tag(part: str) -> bool:
    return "[" in part or part in {"float", "literal"}


def _model_at(model: type[BaseModel] | None, where: list[str]) -> type[BaseModel] | None:
    for part in where:
        if model is None:
            return None
        field = model.model_fields.get(part)
        if field is not None:
            model = next(_classes(field.annotation), None)
    return model


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _classes(argument)
