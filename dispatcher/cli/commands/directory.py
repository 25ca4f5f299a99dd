"""auth test, auth release, sync."""

from __future__ import annotations

import sys
import time

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.cli.ui.output import clean
from dispatcher.cli.ui.prompts import confirm, yes_option
from dispatcher.plugin import names

INTERVAL = 0.25  # seconds between two requests for the progress


@click.group(epilog="\b\nExamples:\n  dispatcher auth test alice\n  dispatcher auth release alice")
def auth() -> None:
    """Test sign-ins, and release names that belong to an account of a directory."""


@auth.command(
    epilog="\b\nExamples:\n  dispatcher auth test alice\n  dispatcher auth test --authenticator ldap alice"
    '\n  printf %s "$PASSWORD" | dispatcher auth test --password-stdin alice'
)
@click.argument("name")
@click.option("--authenticator", metavar="AUTHENTICATOR", help="Ask only this entry of `auth.authenticator`.")
@click.option("--password", is_flag=True, help="Prompt for the password and verify it, too.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input, one line.")
@pass_cli
def test(cli: Cli, name: str, authenticator: str | None, password: bool, password_stdin: bool) -> None:
    """Show the result of a sign-in as NAME, without one: user, groups, apps.  Nothing is changed.

    Without a password the user is only looked up in the directory.  The exit code is 1 if the sign-in would be
    refused.
    """
    secret = None
    if password_stdin:
        secret = sys.stdin.readline().rstrip("\r\n")
    elif password:
        secret = click.prompt("Password", hide_input=True, err=True)
    found = cli.client().test_sign_in(name, secret, authenticator)
    if cli.out.json:
        cli.out.data(found)
    else:
        lines = [
            ("user", found.get("user")),
            ("authenticator", found.get("authenticator")),
            ("groups", ", ".join(found.get("groups", [])) or "none"),
            ("groups of the configuration", ", ".join(found.get("configured_groups", [])) or "none"),
            ("apps", ", ".join(found.get("apps", [])) or "none"),
            ("agents", ", ".join(found.get("agents", [])) or "none yet"),
        ]
        cli.out.line("accepted" if found["accepted"] else f"refused: {found['refusal']}")
        if "user" in found:
            for label, value in lines:
                cli.out.line(f"  {label}: {clean(str(value))}")
    if not found["accepted"]:
        raise click.exceptions.Exit(1)


@auth.command(epilog="\b\nExample:\n  dispatcher auth release alice")
@click.argument("name")
@yes_option
@pass_cli
def release(cli: Cli, name: str, yes: bool) -> None:
    """Release the name NAME: the next account of a directory that signs in with it gets the agents and data.

    For a name that a directory gave to another person, and for a change of the authenticator.  A password that is
    stored here is deleted: a local user becomes one of the directory.
    """
    name = names.user_name(name)
    question = f"The next account that signs in as {name} gets the agents and data; a local password is deleted."
    confirm(f"{question}  Continue?", f"{name} is unchanged", yes=yes)
    cli.client().release_user(name)
    cli.out.result({"name": name}, f"{name} belongs to the next account that signs in with this name")


@click.command(epilog="\b\nExamples:\n  dispatcher sync --dry-run\n  dispatcher sync")
@click.option("--dry-run", is_flag=True, help="Show what would change.")
@click.option("--force", is_flag=True, help="Accept that most users of a directory have left.")
@pass_cli
def sync(cli: Cli, dry_run: bool, force: bool) -> None:
    """Read the groups of all users from their directories, and find users who have left.

    Users who have left are signed out and their agents stop.  The manager does this regularly
    (`auth.sync_interval`).
    """
    client = cli.client()
    found = client.begin_sync(force=force, dry_run=dry_run)
    live = sys.stderr.isatty() and not cli.out.json
    while found["running"]:
        time.sleep(INTERVAL)
        found = client.sync()
        if live:
            click.echo(f"\r{found['asked']} of {found['users']} users", nl=False, err=True)
    if live:
        click.echo("\r\x1b[K", nl=False, err=True)
    if cli.out.json:
        cli.out.data(found)
    else:
        for label, key in (
            ("groups changed", "changed"),
            ("left", "left"),
            ("back", "back"),
            ("data deleted", "removed"),
        ):
            for name in found[key]:
                cli.out.line(f"{name}: {label}")
        for source, count in found["skipped"].items():
            cli.out.line(f"{source}: {count} users were skipped, the authenticator cannot look up users")
        for problem in found["problems"]:
            click.echo(f"problem: {clean(problem)}", err=True)
        would = "would be " if dry_run else ""
        total = sum(len(found[key]) for key in ("changed", "left", "back", "removed"))
        cli.out.line(f"{found['users']} users, {total} {would}changed")
    if found["problems"]:
        raise click.exceptions.Exit(1)
