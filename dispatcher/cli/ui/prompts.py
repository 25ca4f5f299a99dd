"""Arguments and questions that several commands share: agents' names, passwords, confirmations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest

MIN_PASSWORD, MAX_PASSWORD = 8, 1024
_F = TypeVar("_F", bound=Callable[..., Any])


def _agent_name(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    return names.agent_name(value)


def agent_argument(function: _F) -> _F:
    """Add the argument NAME, an agent's (``USER`` or ``USER:APP``), in its canonical form."""
    return click.argument("name", callback=_agent_name)(function)


def yes_option(function: _F) -> _F:
    """Add ``--yes``."""
    return click.option(
        "-y", "--yes", is_flag=True, help="Do not ask for confirmation (asked only on a terminal)."
    )(function)


def confirm(question: str, refusal: str, *, yes: bool) -> None:
    """Ask for confirmation on a terminal; without one, or with ``--yes``, return at once.

    :raises click.ClickException: the answer is no; its text is `refusal`.
    """
    if yes or not sys.stdin.isatty():
        return
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort as error:
        if not isinstance(error.__context__, EOFError):
            raise
        agreed = False  # the end of the input is no agreement
        click.echo("", err=True)
    if not agreed:
        raise click.ClickException(refusal)


def password_option(function: _F) -> _F:
    """Add ``--password-stdin``."""
    return click.option("--password-stdin", is_flag=True, help="Read the password from standard input, one line.")(
        function
    )


def new_password(*, from_stdin: bool) -> str:
    """Return a password: one line of standard input, or typed twice on a terminal.

    :raises BadRequest: there is no terminal, or the password is too short or too long.
    """
    if from_stdin:
        password = _read_line()
    elif sys.stdin.isatty():
        click.echo(f"At least {MIN_PASSWORD} characters.", err=True)
        password = click.prompt("Password", hide_input=True, confirmation_prompt="Repeat password", err=True)
    else:
        raise BadRequest(
            "No password", why="standard input is not a terminal", fix="give it with --password-stdin"
        )
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise BadRequest(
            "Bad password",
            why=f"it has {len(password)} characters, not {MIN_PASSWORD} to {MAX_PASSWORD}",
            fix="choose another one",
        )
    return password


def _read_line() -> str:
    raw = sys.stdin.buffer.readline(MAX_PASSWORD * 4 + 2)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest("Bad password", why="it is not UTF-8", fix="choose another one") from error
    return text.removesuffix("\n").removesuffix("\r")
