"""logs, why.  Touches the manager."""

from __future__ import annotations

import sys
import time

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.cli.ui.output import clean
from dispatcher.cli.ui.prompts import agent_argument

INTERVAL = 0.5  # seconds between questions of `logs -f`


@click.command(epilog="\b\nExamples:\n  dispatcher logs alice\n  dispatcher logs -f -n 20 alice")
@agent_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("-n", "--tail", metavar="N", type=click.IntRange(0, 100_000), default=100, show_default=True)
@json_option
@pass_cli
def logs(cli: Cli, name: str, follow: bool, tail: int) -> None:
    """Show the last lines that the agent NAME printed."""
    client = cli.client()
    answer = client.logs(name, tail=tail)
    if cli.out.json and not follow:
        cli.out.data(answer)
        return
    # A terminal must not be driven by what an agent prints; a file or a program gets it as it was.
    show = clean if sys.stdout.isatty() else str
    while True:
        for line in answer["lines"]:
            click.echo(show(line))
        if not follow:
            return
        sys.stdout.flush()
        if not answer["lines"]:
            time.sleep(INTERVAL)
        answer = client.logs(name, tail=10_000, after=answer["cursor"])


@click.command(epilog="\b\nExample:\n  dispatcher why alice")
@agent_argument
@json_option
@pass_cli
def why(cli: Cli, name: str) -> None:
    """Say in sentences why the agent NAME is in its state."""
    answer = cli.client().why(name)
    if cli.out.json:
        cli.out.data(answer)
        return
    for sentence in answer["sentences"]:
        cli.out.line(sentence)
