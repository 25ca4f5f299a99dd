"""Writes a plugin that works: module, tests with the kit, README, CI file.  `templates/` has the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dispatcher.config.plugins import BUILT_IN, Plugins
from dispatcher.config.schema import AppConfig, AuthConfig
from dispatcher.plugin.errors import BadRequest, Conflict
from dispatcher.plugin.names import app_name, printable

Kind = Literal["provider", "authenticator", "observer"]
TEMPLATES = Path(__file__).with_name("templates")
DESCRIPTIONS: dict[Kind, str] = {
    "provider": "Agents as plain processes",
    "authenticator": "Users in a file",
    "observer": "Events as lines of JSON",
}


@dataclass(frozen=True)
class Names:
    """How the parts of a plugin are called."""

    name: str

    @property
    def distribution(self) -> str:
        """The name of the distribution."""
        return f"dispatcher-{self.name.replace('_', '-')}"

    @property
    def module(self) -> str:
        """The name of the module."""
        return f"dispatcher_{self.stem}"

    @property
    def stem(self) -> str:
        """The name as a part of an identifier."""
        return self.name.replace("-", "_")

    @property
    def cls(self) -> str:
        """The name as a part of a class's name."""
        return "".join(part.capitalize() for part in self.stem.split("_"))


def new(name: str, kind: Kind, directory: Path | None = None) -> Path:
    """Write a plugin into a directory that does not exist, by default `dispatcher-NAME`; return it.

    :raises BadRequest: the name cannot be one; :raises Conflict: name or directory exists.
    """
    _check_name(name, kind)
    names = Names(name)
    target = directory or Path(names.distribution)
    words = {
        "NAME": name,
        "DISTRIBUTION": names.distribution,
        "MODULE": names.module,
        "CLASS": names.cls,
        "VARIABLE": f"{names.module.upper()}_FILE",
        "DESCRIPTION": DESCRIPTIONS[kind],
        "ROOT": "sudo " if kind == "provider" else "",
    }
    try:
        target.mkdir(parents=True)
    except FileExistsError as error:
        raise Conflict(f"{target} exists", fix="remove it, or name another directory") from error
    except OSError as error:
        raise BadRequest(f"{target} cannot be made", why=error.strerror or str(error)) from error
    for home in (TEMPLATES / "every", TEMPLATES / kind):
        for source in sorted(home.rglob("*.tmpl")):
            path = target / source.relative_to(home).with_suffix("")
            path = path.with_name({"module.py": f"{names.module}.py", "test.py": f"test_{names.stem}.py"}.get(
                path.name, path.name))  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_filled(source.read_text(encoding="utf-8"), words), encoding="utf-8")
    return target


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text


def _check_name(name: str, kind: Kind) -> None:
    try:
        app_name(name)
    except BadRequest as error:
        raise BadRequest(f"Bad name of a plugin {printable(name)}", why=error.why, fix="choose another") from error
    taken = Plugins().available()
    if name in taken or name in BUILT_IN:
        owner = taken.get(name, "agent-dispatcher")
        raise Conflict(f"There is a plugin {name!r}", why=f"it is of {owner}", fix="choose another name")
    keys = {"provider": AppConfig.model_fields, "authenticator": AuthConfig.model_fields}.get(kind, {})
    if name in keys:
        where = "[apps.NAME]" if kind == "provider" else "[auth]"
        raise Conflict(f"{name!r} cannot be the name of this plugin", why=f"it is a key of {where}",
                       fix="choose another name")  # fmt: skip
