"""What the command line prints: tables, JSON, notes.  Touches standard output and standard error.

On a terminal tables are drawn by rich, imported then; elsewhere they are plain columns that `awk` can read.
Text that comes from agents, users or backends is never trusted to hold no control characters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
STATE_STYLES = {
    "running": "green",
    "starting": "yellow",
    "suspending": "yellow",
    "stopping": "yellow",
    "removing": "yellow",
    "suspended": "cyan",
    "hibernated": "cyan",
    "failed": "bold red",
    "unknown": "magenta",
}


@dataclass
class Output:
    """Where and how to print.

    :ivar json: data goes out as JSON.
    """

    json: bool = False

    def data(self, value: Any) -> None:
        """Print `value` as JSON."""
        import json

        click.echo(json.dumps(value, indent=2, ensure_ascii=False))

    def line(self, text: str = "") -> None:
        """Print one line for people; nothing when JSON was asked for."""
        if not self.json:
            click.echo(clean(text))

    def note(self, text: str) -> None:
        """Say something on standard error."""
        click.echo(f"dispatcher: {clean(text)}", err=True)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "") -> None:
        """Print a table; headings that end with ``>`` stand above numbers.  An empty one says `empty` instead."""
        cells = [[clean("" if cell is None else str(cell)).replace("\n", " ") for cell in row] for row in rows]
        names = [heading.rstrip(">") for heading in headings]
        right = [heading.endswith(">") for heading in headings]
        if not cells:
            if empty:
                self.note(empty)
        elif sys.stdout.isatty():
            _rich_table(names, right, cells)
        else:
            click.echo("\n".join(columns(names, right, cells)))

    def pairs(self, values: Mapping[str, object]) -> None:
        """Print a record, a line for each value that there is."""
        shown = {key: clean(str(value)) for key, value in values.items() if value not in (None, "", [], {})}
        width = max(map(len, shown), default=0)
        for key, value in shown.items():
            click.echo(f"{key.ljust(width)}  {value}")


def columns(headings: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return plain lines of aligned columns, two spaces apart."""
    table = [list(headings), *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(headings))]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in table
    ]


def _rich_table(headings: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for heading, to_right in zip(headings, right, strict=True):
        table.add_column(heading, justify="right" if to_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in row))
    Console(highlight=False, markup=False).print(table)


def clean(text: str) -> str:
    """Return `text` with control characters escaped, so that no log line or name can drive the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def human_bytes(count: float | None) -> str:
    """Return ``512 B``, ``34.5 MiB``, ...; ``-`` for None."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float | None) -> str:
    """Return ``0.4s``, ``59s``, ``2m 5s``, ``3h 20m``, ``4d 1h``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    parts: list[tuple[int, str]] = []
    rest = int(seconds)
    for unit, length in _UNITS:
        count, rest = divmod(rest, length)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count}{unit}" for count, unit in parts[:2] if count)


def ago(stamp: str | None, *, never: str = "never", now: float | None = None) -> str:
    """Return how long ago an ISO 8601 time was: ``3m 2s ago``; `never` for None."""
    if not stamp:
        return never
    from datetime import datetime

    try:
        then = datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return stamp
    seconds = (time.time() if now is None else now) - then
    return "just now" if seconds < 1 else f"{human_seconds(round(seconds))} ago"
