"""The pages of the documentation and their code blocks.

A block of shell commands is run by tests/integration/test_docs_commands.py, unless a comment in the line before it
says `<!-- run by tests/FILE.py::TEST -->` or `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\S*)(?: title=\"[^\"]*\")?\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    mark: str  # "", or what the comment before it says
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the page's blocks in these languages (all, if none is given), in order."""
    found = [
        Block(match["mark"] or "", match["language"], match["text"]) for match in _BLOCK.finditer(page.read_text())
    ]
    return [block for block in found if not languages or block.language in languages]


def configuration(page: Path) -> dict:
    """Return the configuration that all `toml` blocks of a page are together."""
    whole: dict = {}
    for block in blocks(page, "toml"):
        table = tomllib.loads(block.text)
        whole = whole if "project" in table else merged(whole, table)
    return whole


def merged(one, two):
    """Return two tables of a configuration as one."""
    both = isinstance(one, dict) and isinstance(two, dict)
    return {**one, **{key: merged(one.get(key), value) for key, value in two.items()}} if both else two
