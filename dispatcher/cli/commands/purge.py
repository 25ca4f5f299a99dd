"""purge: delete the data that is kept of an agent, or of a removed agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.cli.ui.prompts import agent_argument, confirm, yes_option
from dispatcher.common import humanize

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json


@click.command(epilog="\b\nExamples:\n  dispatcher purge alice\n  dispatcher purge --yes alice:notebook")
@agent_argument
@yes_option
@json_option
@pass_cli
def purge(cli: Cli, name: str, yes: bool) -> None:
    """Delete the kept data of the agent NAME: old copies from moves, and what `remove --keep-data` kept.

    The live data of an existing agent is not touched.  `dispatcher info NAME` lists what is kept.
    """
    client = cli.client()
    copies = client.copies(name)["copies"]
    if not copies:
        cli.out.result({"purged": 0, "copies": []}, f"no data is kept of {name}")
        return
    for copy in copies:
        cli.out.line(describe(copy))
    confirm(f"Delete this data of {name}?", yes=yes)
    purged = client.purge_copies(name)["purged"]
    text = f"{purged} {'copy' if purged == 1 else 'copies'} deleted"
    cli.out.result({"purged": purged, "copies": copies}, text)


def describe(copy: Json) -> str:
    """Return one line about kept data: its size, since when it is kept, and why."""
    size = "size unknown" if copy["size"] is None else humanize.size(copy["size"])
    since = f"{copy['time'][:10]} ({humanize.ago(copy['time'])})"
    return f"{size} in {copy['provider']}, kept since {since}: {copy['why']}"
