"""Plugins with one fault each, and a distribution that declares them, as a third party would install it.

Each case says what becomes of its app and which words the error must have.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

NAME, VERSION = "acme-broken", "1.2"
DISTRIBUTION = f"{NAME} {VERSION}"
#: Modules that are at fault before anything of them can be used: name -> source, and words of the error.
MODULES = {
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "cancels": ("import asyncio\nraise asyncio.CancelledError", "CancelledError"),
    "fatal": ("class Fatal(BaseException): ...\nraise Fatal('gone')", "Fatal: gone"),
    "misspelt": ("def (:", "SyntaxError"),
    "needs-module": ("import acme_is_not_installed", "acme_is_not_installed is not installed"),
    "unspeakable": (
        "class Unspeakable(Exception):\n    def __str__(self): raise SystemExit\nraise Unspeakable",
        "Unspeakable",
    ),
    "hangs": ("from tests.support.broken.providers import forever\nforever()", "does not return"),
    "empty": ("", "no provider"),
    "unreadable": (
        "def __getattr__(name): raise SystemExit(name)\ndef __dir__(): return ['dispatcher_x']",
        "registers no provider",
    ),
    "unknown-hook": (
        "from dispatcher.plugin import hookimpl\n@hookimpl\ndef dispatcher_register_provider(): ...",
        "did you mean 'dispatcher_register_providers'?",
    ),
    "wrong-arguments": (
        "from dispatcher.plugin import hookimpl\n@hookimpl\ndef dispatcher_register_providers(config): ...",
        "config",
    ),
}


@dataclass(frozen=True)
class Case:
    """What a fault leads to.

    :ivar outcome: ``refused`` (no agent of the app can be made), ``fails`` (its start fails), ``unknown`` (its
        backend does not answer), ``runs``.
    :ivar words: of the error, all of them; :ivar app: more keys of its app.
    """

    outcome: str
    words: tuple[str, ...]
    app: dict[str, object]


def install(site: Path) -> list[EntryPoint]:
    """Write the distribution into a directory, as `pip install` would; return its entry points."""
    from tests.support.broken import authenticators, observers, providers

    info = site / f"{NAME.replace('-', '_')}-{VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
    lines = ["[dispatcher.plugins]"]
    for name, (source, _) in MODULES.items():
        module = f"acme_{name.replace('-', '_')}"
        (site / f"{module}.py").write_text(textwrap.dedent(source) + "\n")
        lines.append(f"{name} = {module}")
    lines.append("no-attribute = acme_empty:there_is_none")
    for home in (providers, authenticators, observers):
        lines += [f"{name} = {home.__name__}:{attribute}" for name, attribute in home.entries()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return list(entry_points(site))


def entry_points(site: Path) -> Iterator[EntryPoint]:
    """Yield the plugins that the distributions in a directory declare."""
    for distribution in distributions(path=[str(site)]):
        yield from distribution.entry_points
