"""Output of the command line: tables, JSON, notes.

On a terminal rich draws the tables, to fit its width.  Elsewhere they are plain columns for programs, never cut.
Control characters in text of agents, users or backends are escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click

GAP = 2  # characters between two columns
_FOLDED = 20  # minimum width of a table's last column, which is wrapped
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
    """How to print.

    :ivar json: print data as JSON.
    """

    json: bool = False

    def data(self, value: Any) -> None:
        """Print `value` as JSON, with what may control a terminal escaped: C1 and directions of writing, too."""
        import json

        text = json.dumps(value, indent=2, ensure_ascii=False)
        plain = (char if char.isprintable() or char == "\n" else _escaped(char) for char in text)
        click.echo("".join(plain))

    def result(self, value: Any, text: str) -> None:
        """Print `value` when JSON is asked for, else `text`."""
        if self.json:
            self.data(value)
        else:
            self.line(text)

    def line(self, text: str = "") -> None:
        """Print one line for people; nothing when JSON is asked for."""
        if not self.json:
            click.echo(clean(text))

    def note(self, text: str) -> None:
        """Print a note on standard error."""
        click.echo(f"dispatcher: {clean(text)}", err=True)

    def table(
        self,
        value: Any,
        headings: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        empty: str,
        least: Sequence[str] = (),
    ) -> None:
        """Print `value` when JSON is asked for, else a table.

        :param headings: those that end with ``>`` stand above numbers.
        :param empty: a note in place of a table without rows.
        :param least: headings of the columns that a narrow terminal leaves out, the least important first.
        """
        if self.json:
            self.data(value)
            return
        cells = [[clean("" if cell is None else str(cell)).replace("\n", " ") for cell in row] for row in rows]
        names = [heading.rstrip(">") for heading in headings]
        right = [heading.endswith(">") for heading in headings]
        if not cells:
            self.note(empty)
        elif sys.stdout.isatty():
            _terminal_table(names, right, cells, least)
        else:
            filled = [[*(cell or "-" for cell in row[:-1]), row[-1]] for row in cells]
            click.echo("\n".join(columns(names, right, filled)))

    def pairs(self, values: Mapping[str, object]) -> None:
        """Print a record, one line for each value that is not empty."""
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


def fitting(headings: Sequence[str], widths: Sequence[int], least: Sequence[str], width: int) -> list[int] | None:
    """Return the columns of a table that fit into `width` characters; None when the necessary ones do not.

    :param widths: of the columns; one of width 0 is left out.  :param least: those to leave out, in this order.
    """

    def total(columns: Sequence[int]) -> int:
        return sum(widths[at] for at in columns) + GAP * (len(columns) - 1)

    shown = [at for at in range(len(headings)) if widths[at]]
    for heading in least:
        if total(shown) <= width:
            break
        shown = [at for at in shown if headings[at] != heading]
    return shown if total(shown) <= width else None


def _terminal_table(
    headings: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]], least: Sequence[str]
) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    widths = [max(cell_len(row[at]) for row in (headings, *rows)) for at in range(len(headings))]
    widths[-1] = min(widths[-1], _FOLDED)  # its text is wrapped
    shown = fitting(headings, widths, least, console.width)
    if shown is None:
        click.echo("\n\n".join(_block(headings, row) for row in rows))
        return
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold", show_edge=False, pad_edge=False)
    for at in shown:
        justify: Literal["right", "left"] = "right" if right[at] else "left"
        table.add_column(headings[at], justify=justify, overflow="fold", min_width=widths[at])
    for row in rows:
        table.add_row(*(Text(row[at], style=STATE_STYLES.get(row[at], "")) for at in shown))
    console.print(table)


def _block(headings: Sequence[str], row: Sequence[str]) -> str:
    """Return a row as lines: its first cell, then the others below it."""
    wide = max(map(len, headings[1:]))
    rest = [
        f"  {heading.ljust(wide)}  {cell}" for heading, cell in zip(headings[1:], row[1:], strict=True) if cell
    ]
    return "\n".join([row[0], *rest])


def _escaped(char: str) -> str:
    """Return JSON's escape of a character, which has two parts beyond U+FFFF."""
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def clean(text: str) -> str:
    """Return `text` with control characters escaped, so that no log line or name can control the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
