"""add, remove, passwd."""

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
@click.option("--app", metavar="APP", help="The agent's app; default: default_app of the configuration.")
@password_option
@click.option("--no-password", is_flag=True, help="Add no password, for users of an external directory.")
@json_option
@pass_cli
def add(cli: Cli, name: str, app: str | None, password_stdin: bool, no_password: bool) -> None:
    """Add the user NAME and an agent; asks for a password.

    For an existing user, --app adds another agent, named NAME:APP, without asking for a password.
    """
    if password_stdin and no_password:
        raise click.UsageError("--password-stdin and --no-password exclude each other")
    client = cli.client()
    known = not password_stdin and _known(client, name, app)
    password = None if known or no_password else new_password(from_stdin=password_stdin)
    agent = client.create_agent(name, password, app)
    cli.out.result(agent, f"{agent.get('name', name)} was added")


def _known(client: ManagerClient, name: str, app: str | None) -> bool:
    """Whether the user exists and no password is needed.

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
        raise Conflict(f"{name} exists", fix="add another agent with --app, or choose another name")
    return True


@click.command(epilog="\b\nExamples:\n  dispatcher remove alice\n  dispatcher remove --keep-data --yes alice")
@agent_argument
@click.option("--keep-data", is_flag=True, help="Keep the data for an agent that is added with the same name.")
@yes_option
@wait_option
@json_option
@pass_cli
def remove(cli: Cli, name: str, keep_data: bool, yes: bool, wait: bool) -> None:
    """Stop and remove the agent NAME and delete its data.  The user is removed with the last agent."""
    cli.client().agent(name)
    confirm(f"Remove {name}{'' if keep_data else ' and all its data'}?", yes=yes)

    def send(client: ManagerClient, seconds: float | None) -> Json:
        return client.delete_agent(name, keep_data=keep_data, wait=seconds)

    answer = follow(cli, name, send, lambda state: not state, wait=wait)
    text = f"{name} {'was removed' if wait else 'is being removed'}"
    if keep_data:
        text += f"; its data is kept (`dispatcher purge {name}` deletes it)"
    cli.out.result(answer or {"name": name, "state": "absent"}, text)


@click.command(epilog="\b\nExample:\n  dispatcher passwd alice")
@agent_argument
@password_option
@pass_cli
def passwd(cli: Cli, name: str, password_stdin: bool) -> None:
    """Set the password of the user NAME and end the user's sign-ins."""
    client = cli.client()
    # Checked before the password is typed.  A user may have only agents of other apps (NAME:APP).
    agents = [agent["name"] for agent in client.agents()["agents"] if name in (agent["name"], agent["user"])]
    if not agents:
        raise NotFound(f"There is no user {name}", fix="see `dispatcher list`")
    client.set_password(agents[0], new_password(from_stdin=password_stdin))
    cli.out.line(f"{name} has a new password")
