"""tokens create, tokens list, tokens revoke."""

from __future__ import annotations

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.common import humanize
from dispatcher.common.api_tokens import DEFAULT_EXPIRY, SCOPES, described
from dispatcher.plugin import names
from dispatcher.plugin.errors import DispatcherError


@click.group(
    epilog="\b\nExamples:\n  dispatcher tokens create --service prometheus --scope metrics"
    "\n  dispatcher tokens list\n  dispatcher tokens revoke 0123456789abcdef"
)
def tokens() -> None:
    """Create, list and revoke API tokens: credentials for programs (Authorization: Bearer)."""


@tokens.command(
    epilog="\b\nScopes:\n"
    + "".join(f"  {name:8} {text}\n" for name, text in SCOPES.items())
    + "\n\b\nExamples:\n  dispatcher tokens create --service prometheus --scope metrics"
    "\n  dispatcher tokens create --user alice --scope app --expires 30d --note 'nightly export'"
    "\n  dispatcher tokens create --service backup --scope read --expires never"
)
@click.option("--user", metavar="NAME", help="The owner: a user.")
@click.option("--service", metavar="NAME", help="The owner: a program of yours, with a name of your choice.")
@click.option(
    "--scope", "scopes", metavar="SCOPE", multiple=True, help="A scope, see below; may be given repeatedly."
)
@click.option(
    "--expires",
    metavar="DURATION|DATE",
    default=DEFAULT_EXPIRY,
    show_default=True,
    help="The expiry: 90d, 12h, 2030-01-31 (0:00 UTC), or never.",
)
@click.option("--note", metavar="TEXT", default="", help="The purpose; shown in lists.")
@pass_cli
def create(
    cli: Cli, user: str | None, service: str | None, scopes: tuple[str, ...], expires: str, note: str
) -> None:
    """Create an API token and print it.  It is not shown again."""
    if (user is None) == (service is None):
        raise click.UsageError("Give the owner: --user NAME or --service NAME")
    if not scopes:
        raise click.UsageError(f"Give at least one --scope ({described()})")
    found = cli.client().create_token(
        scopes=scopes,
        user=None if user is None else names.user_name(user),
        service=None if service is None else names.user_name(service),
        expires=expires,
        note=note,
    )
    if cli.out.json:
        cli.out.data(found)
        return
    until = f"expires {found['expires'][:10]}" if found["expires"] else "never expires"
    cli.out.line(found["token"])
    cli.out.note(f"token {found['id']}, scope {' '.join(found['scopes'])}, {until}; it is not shown again")


@tokens.command(
    "list", epilog="\b\nExamples:\n  dispatcher tokens list\n  dispatcher tokens list --user alice --json"
)
@click.option("--user", metavar="NAME", help="Only those of this user.")
@pass_cli
def list_tokens(cli: Cli, user: str | None) -> None:
    """List the API tokens with owner, scopes and times."""
    found = cli.client().tokens(names.user_name(user) if user else None)
    cli.out.table(
        found,
        ["ID", "OWNER", "SCOPES", "CREATED", "EXPIRES", "LAST USED", "NOTE"],
        (
            [
                token["id"],
                token["user"] or f"service {token['service']}",
                " ".join(token["scopes"]),
                humanize.ago(token["created"]),
                humanize.ago(token["expires"]),
                humanize.ago(token["last_used"]),
                token["note"],
            ]
            for token in found["tokens"]
        ),
        empty="no API tokens (create one: dispatcher tokens create)",
        least=("CREATED", "NOTE", "LAST USED"),
    )


@tokens.command(
    epilog="\b\nExamples:\n  dispatcher tokens revoke 0123456789abcdef\n  dispatcher tokens revoke --user alice"
)
@click.argument("token", metavar="[ID]", required=False)
@click.option("--user", metavar="NAME", help="All those of this user.")
@pass_cli
def revoke(cli: Cli, token: str | None, user: str | None) -> None:
    """Revoke the API token ID, or all of a user, and close their connections."""
    if (token is None) == (user is None):
        raise click.UsageError("Give the ID of one token, or --user NAME")
    client = cli.client()
    if user is not None:
        count = int(client.revoke_tokens(names.user_name(user)).get("revoked", 0))
    else:
        client.revoke_token(token or "")
        count = 1
    cli.out.result({"revoked": count}, f"{count} token{'' if count == 1 else 's'} revoked")


def note_tokens(cli: Cli, user: str) -> None:
    """Tell an operator who ends a user's sessions about the user's API tokens, which stay valid."""
    try:
        count = len(cli.client().tokens(user)["tokens"])
    except DispatcherError:  # an earlier manager has none
        return
    if count:
        them = "one API token, which stays" if count == 1 else f"{count} API tokens, which stay"
        cli.out.note(f"{user} has {them} valid; to revoke: dispatcher tokens revoke --user {user}")
