"""add, remove, passwd.  Touches the manager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dispatcher.cli.commands.lifecycle import wait_option
from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.cli.ui.progress import follow
from dispatcher.cli.ui.prompts import agent_argument, confirm, new_password, password_option, yes_option
from dispatcher.plugin.errors import Conflict, NotFound

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json, ManagerClient


@click.command(
    epilog="\b\nExamples:\n  dispatcher add alice\n  dispatcher add alice --app notebook"
    "\n  pwgen 20 1 | tee /dev/tty | dispatcher add --password-stdin bob@example.org"
)
@agent_argument
@click.option("--app", metavar="APP", help="What the agent runs; the configuration's default_app otherwise.")
@password_option
@click.option("--no-password", is_flag=True, help="None is needed: another directory checks passwords.")
@json_option
@pass_cli
def add(cli: Cli, name: str, app: str | None, password_stdin: bool, no_password: bool) -> None:
    """Add the person NAME and an agent for them; asks for a password.

    For a person who is known already, --app adds a further agent, called NAME:APP, and no password is asked for.
    """
    if password_stdin and no_password:
        raise click.UsageError("--password-stdin and --no-password contradict each other")
    client = cli.client()
    known = not password_stdin and _known(client, name, app)
    password = None if known or no_password else new_password(from_stdin=password_stdin)
    agent = client.create_agent(name, password, app)
    if cli.out.json:
        cli.out.data(agent)
    else:
        cli.out.line(f"{agent.get('name', name)} was added")


def _known(client: ManagerClient, name: str, app: str | None) -> bool:
    """Whether the person exists, so that nobody is asked for a password in vain.

    :raises Conflict: the agent exists.
    """
    user, _, named_app = name.partition(":")
    try:
        client.agent(name)
    except NotFound:
        if named_app or app:
            return any(agent.get("user") == user for agent in client.agents()["agents"])
        return False
    if app is None:
        raise Conflict(f"{name} exists", fix="give them a further agent with --app, or choose another name")
    return True


@click.command(epilog="\b\nExamples:\n  dispatcher remove alice\n  dispatcher remove --keep-data --yes alice")
@agent_argument
@click.option("--keep-data", is_flag=True, help="Keep the data for somebody who is added under the same name.")
@yes_option
@wait_option
@json_option
@pass_cli
def remove(cli: Cli, name: str, keep_data: bool, yes: bool, wait: bool) -> None:
    """Remove the agent NAME: stopped, its data deleted.  The person goes with the last agent."""
    cli.client().agent(name)
    confirm(f"Remove {name}{'' if keep_data else ' and all its data'}?", yes=yes)

    def ask(client: ManagerClient, seconds: float | None) -> Json:
        return client.delete_agent(name, keep_data=keep_data, wait=seconds)

    answer = follow(cli, name, ask, lambda state: not state, wait=wait)
    if cli.out.json:
        cli.out.data(answer or {"name": name, "state": "absent"})
    else:
        kept = ", its data kept" if keep_data else ""
        cli.out.line(f"{name} {'was removed' if wait else 'is being removed'}{kept}")


@click.command(epilog="\b\nExample:\n  dispatcher passwd alice")
@agent_argument
@password_option
@pass_cli
def passwd(cli: Cli, name: str, password_stdin: bool) -> None:
    """Set the password of the person NAME.  Their sign-ins end."""
    client = cli.client()
    # Before anybody types it twice.  A person may have only agents of other apps (NAME:APP): any of them will do.
    agents = [agent["name"] for agent in client.agents()["agents"] if name in (agent["name"], agent["user"])]
    if not agents:
        raise NotFound(f"There is no person {name}", fix="`dispatcher list` shows those there are")
    client.set_password(agents[0], new_password(from_stdin=password_stdin))
    cli.out.line(f"{name} has a new password")
