"""top, memory-usage."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.cli.ui.output import Output
from dispatcher.common import humanize

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json


@click.command(epilog="\b\nExamples:\n  dispatcher top\n  dispatcher top --once --sort cpu")
@click.option("--once", is_flag=True, help="Print one table and exit; the default without a terminal.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(0.5, 3600),
    default=2.0,
    show_default=True,
    help="Time between two tables.",
)
@click.option(
    "--sort",
    type=click.Choice(["memory", "cpu", "name"]),
    default="memory",
    show_default=True,
    help="Column to sort by.",
)
@json_option
@pass_cli
def top(cli: Cli, once: bool, interval: float, sort: str) -> None:
    """Show the memory and CPU use of agents, refreshed until Ctrl-C."""
    client = cli.client()
    live = sys.stdout.isatty() and not once and not cli.out.json
    while True:
        found = client.top()
        if live:
            click.clear()
        _usage_table(cli.out, found, sort)
        if not live:
            return
        try:
            time.sleep(interval)
        except KeyboardInterrupt:
            return


def _usage_table(out: Output, found: Json, sort: str) -> None:
    def key(agent: Json) -> tuple[float, str]:
        used = agent.get({"memory": "memory", "cpu": "cpu_percent"}.get(sort, "")) or 0.0
        return -float(used), agent["name"]

    out.table(
        found,
        ["NAME", "STATE", "MEMORY>", "CPU %>", "CPU TIME>", "LAST USED"],
        (
            [
                agent["name"],
                agent["state"],
                humanize.size(agent.get("memory")),
                "-" if agent.get("cpu_percent") is None else f"{agent['cpu_percent']:.1f}",
                humanize.short_duration(agent.get("cpu_seconds")),
                humanize.ago(agent.get("last_used")),
            ]
            for agent in sorted(found["agents"], key=key)
        ),
        empty="no agent is running",
        least=("LAST USED", "CPU TIME", "STATE"),
    )


@click.command("memory-usage", epilog="\b\nExample:\n  dispatcher memory-usage")
@json_option
@pass_cli
def memory_usage(cli: Cli) -> None:
    """Show the memory of running agents: of each, the total and the average."""
    found = cli.client().memory_usage()
    agents = sorted(found["agents"], key=lambda agent: -(agent.get("memory") or 0))
    rows = [[agent["name"], humanize.size(agent.get("memory"))] for agent in agents]
    if rows:
        rows += [["total", humanize.size(found["total"])], ["average", humanize.size(found["average"])]]
    cli.out.table(found, ["NAME", "MEMORY>"], rows, empty="no agent is running")
