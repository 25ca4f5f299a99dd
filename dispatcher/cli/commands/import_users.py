"""import."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import NamedTuple

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.cli.ui.prompts import MAX_PASSWORD, MIN_PASSWORD
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, Conflict, DispatcherError, ManagerUnreachable

COLUMNS = ("name", "app", "password")
MAX_SIZE = 64 << 20  # bytes of a file
MAX_SHOWN = 20  # errors


class Line(NamedTuple):
    """A line of the file."""

    number: int
    name: str
    app: str | None
    password: str | None


@click.command(
    "import",
    epilog="\b\nExamples:\n  dispatcher import users.csv\n  dispatcher import --app notebook --dry-run users.csv"
    "\n\n\b\nA file:\n  name,app,password\n  alice,notebook,\n  bob,,correct horse battery",
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--app", metavar="APP", help="App of lines without one; by default `default_app`.")
@click.option("--dry-run", is_flag=True, help="Check the file only.")
@pass_cli
def import_users(cli: Cli, file: Path, app: str | None, dry_run: bool) -> None:
    """Add users from the CSV file FILE (`-`: standard input).

    The first line names the columns: `name`, and optionally `app` and `password`.  Only users of the authenticator
    `local` need a password.  If a line is invalid, no user is added.  Existing users are not changed, so an import
    can be repeated.
    """
    lines = _lines(_read(file), app)
    added: list[str] = []
    present: list[str] = []
    failed: list[str] = []
    if not dry_run:
        client = cli.client()
        known = {agent["name"] for agent in client.agents()["agents"]}
        live = sys.stderr.isatty() and not cli.out.json
        for done, line in enumerate(lines):
            if live:
                click.echo(f"\r{done} of {len(lines)}", nl=False, err=True)
            if line.name in known or (line.app and f"{line.name}:{line.app}" in known):
                present.append(line.name)
                continue
            try:
                added.append(client.create_agent(line.name, line.password, line.app)["name"])
            except ManagerUnreachable:
                click.echo(f"{len(added)} users were added before", err=True)
                raise
            except Conflict:
                present.append(line.name)
            except DispatcherError as error:
                failed.append(f"line {line.number}: {line.name}: {error}")
        if live:
            click.echo("\r\x1b[K", nl=False, err=True)
    for text in failed[:MAX_SHOWN]:
        click.echo(text, err=True)
    if len(failed) > MAX_SHOWN:
        click.echo(f"and {len(failed) - MAX_SHOWN} more", err=True)
    result = {"lines": len(lines), "added": added, "present": present, "failed": failed}
    text = f"{len(lines)} lines are valid" if dry_run else f"{len(added)} added, {len(present)} were there"
    cli.out.result(result, f"{text}, {len(failed)} failed" if failed else text)
    if failed:
        raise click.exceptions.Exit(1)


def _read(file: Path) -> str:
    source = "standard input" if str(file) == "-" else str(file)
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(MAX_SIZE + 1)
        else:
            with file.open("rb") as stream:
                data = stream.read(MAX_SIZE + 1)
    except OSError as error:
        raise BadRequest(f"Cannot read {source}", why=error.strerror or str(error)) from error
    if len(data) > MAX_SIZE:
        raise BadRequest(f"{source} is too large", why="it has more than 64 MiB", fix="split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{source} is not UTF-8", fix="save it as UTF-8") from error


def _lines(text: str, app: str | None) -> list[Line]:
    """Return the lines of a CSV file.

    :raises BadRequest: what is wrong with which of them.
    """
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    faults: list[str] = []
    found: list[Line] = []
    seen: dict[tuple[str, str | None], int] = {}
    try:
        head = [column.strip().lower() for column in next(rows, [])]
        unknown = [column for column in head if column not in COLUMNS]
        if "name" not in head or unknown or len(set(head)) < len(head):
            raise BadRequest(
                "The first line does not name the columns",
                why=f"it has {names.printable(first.strip()) if first.strip() else 'nothing'}",
                fix="write name,app,password; app and password can be left out",
            )
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            number = rows.line_num
            if len(row) > len(head):
                faults.append(f"line {number}: it has {len(row)} columns, the first line {len(head)}")
                continue
            cells = dict(zip(head, row, strict=False))
            try:
                line = Line(
                    number,
                    names.user_name(cells.get("name", "").strip()),
                    names.app_name(cells["app"].strip()) if cells.get("app", "").strip() else app,
                    cells.get("password") or None,
                )
            except BadRequest as error:
                faults.append(f"line {number}: {error}")
                continue
            if line.password is not None and not MIN_PASSWORD <= len(line.password) <= MAX_PASSWORD:
                faults.append(f"line {number}: the password has {len(line.password)} characters, not 8 to 1024")
            if (before := seen.setdefault((line.name, line.app), number)) != number:
                faults.append(f"line {number}: {line.name} is in line {before}, too")
            found.append(line)
    except csv.Error as error:
        faults.append(f"line {rows.line_num}: {error}")
    if faults:
        more = f"; and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
        raise BadRequest(
            "The file has errors, nothing was added", why="; ".join(faults[:MAX_SHOWN]) + more, fix="correct them"
        )
    return found
