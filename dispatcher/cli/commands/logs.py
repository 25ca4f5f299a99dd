"""logs, why."""

from __future__ import annotations

import sys
import time

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.cli.ui.output import clean
from dispatcher.cli.ui.prompts import agent_argument

INTERVAL = 0.5  # seconds between two requests of `logs -f`


@click.command(epilog="\b\nExamples:\n  dispatcher logs alice\n  dispatcher logs -f -n 20 alice")
@agent_argument
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they come, until Ctrl-C.")
@click.option(
    "-n",
    "--tail",
    metavar="N",
    type=click.IntRange(0, 100_000),
    default=100,
    show_default=True,
    help="Number of lines.",
)
@json_option
@pass_cli
def logs(cli: Cli, name: str, follow: bool, tail: int) -> None:
    """Show the last lines of output of the agent NAME."""
    client = cli.client()
    answer = client.logs(name, tail=tail)
    if cli.out.json and not follow:
        cli.out.data(answer)
        return
    # An agent's output must not control a terminal; a file or a program gets it unchanged.
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
    """Explain the state of the agent NAME: cause, history, what comes next."""
    answer = cli.client().why(name)
    cli.out.result(answer, "\n".join(answer["sentences"]))
