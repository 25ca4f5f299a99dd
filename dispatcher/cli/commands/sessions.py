"""sessions list, sessions revoke."""

from __future__ import annotations

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.common import humanize
from dispatcher.plugin import names


@click.group(epilog="\b\nExamples:\n  dispatcher sessions list\n  dispatcher sessions revoke --user alice")
def sessions() -> None:
    """List and end sign-ins."""


@sessions.command("list", epilog="\b\nExample:\n  dispatcher sessions list --user alice")
@click.option("--user", metavar="NAME", help="Only those of this user.")
@json_option
@pass_cli
def list_sessions(cli: Cli, user: str | None) -> None:
    """List the sign-ins with user, address and time."""
    found = cli.client().sessions(names.user_name(user) if user else None)
    cli.out.table(
        found,
        ["ID", "USER", "AGENT", "SIGNED IN", "LAST USED", "ADDRESS", "BROWSER"],
        (
            [
                session["id"],
                session["user"],
                session.get("agent"),
                humanize.ago(session.get("created")),
                humanize.ago(session.get("last_used")),
                session.get("address"),
                (session.get("user_agent") or "")[:60],
            ]
            for session in found["sessions"]
        ),
        empty="no sign-ins",
        least=("BROWSER", "AGENT", "ADDRESS", "SIGNED IN"),
    )


@sessions.command(
    epilog="\b\nExamples:\n  dispatcher sessions revoke 0123456789abcdef"
    "\n  dispatcher sessions revoke --user alice"
)
@click.argument("session", metavar="[ID]", required=False)
@click.option("--user", metavar="NAME", help="All those of this user.")
@json_option
@pass_cli
def revoke(cli: Cli, session: str | None, user: str | None) -> None:
    """End the sign-in ID, or all those of a user, and close their connections."""
    if (session is None) == (user is None):
        raise click.UsageError("Give the ID of one sign-in, or --user NAME")
    client = cli.client()
    if user is not None:
        count = int(client.revoke_sessions(names.user_name(user)).get("revoked", 0))
    else:
        client.revoke_session(session or "")
        count = 1
    if cli.out.json:
        cli.out.data({"revoked": count})
    else:
        cli.out.line(f"{count} sign-in{'' if count == 1 else 's'} ended")
