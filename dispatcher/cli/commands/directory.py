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
    """Try sign-ins, and manage which account of a directory a name belongs to."""


@auth.command(
    epilog="\b\nExamples:\n  dispatcher auth test alice\n  dispatcher auth test --authenticator ldap alice"
    '\n  printf %s "$PASSWORD" | dispatcher auth test --password-stdin alice'
)
@click.argument("name")
@click.option("--authenticator", metavar="AUTHENTICATOR", help="Only this one of `auth.authenticator`.")
@click.option("--password", is_flag=True, help="Ask for the password, and check it, too.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input, one line.")
@pass_cli
def test(cli: Cli, name: str, authenticator: str | None, password: bool, password_stdin: bool) -> None:
    """Show what a sign-in as NAME would give: user, groups, apps.  Nothing is changed.

    Without a password the directory is only asked about the user.  The exit code is 1 if the sign-in would be
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
    """Let the next account of a directory that signs in as NAME have the name, the agents and the data.

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
@click.option("--force", is_flag=True, help="Believe a directory that has lost most of its users.")
@pass_cli
def sync(cli: Cli, dry_run: bool, force: bool) -> None:
    """Ask the directories for the groups of all users, and for users who have left.

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
            ("other groups", "changed"),
            ("left", "left"),
            ("back", "back"),
            ("data deleted", "removed"),
        ):
            for name in found[key]:
                cli.out.line(f"{name}: {label}")
        for source, count in found["skipped"].items():
            cli.out.line(f"{source}: {count} users were not looked up, the authenticator cannot do it")
        for problem in found["problems"]:
            click.echo(f"problem: {clean(problem)}", err=True)
        would = "would be " if dry_run else ""
        total = sum(len(found[key]) for key in ("changed", "left", "back", "removed"))
        cli.out.line(f"{found['users']} users asked for, {total} {would}changed")
    if found["problems"]:
        raise click.exceptions.Exit(1)
