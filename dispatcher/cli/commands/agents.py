"""add, remove, passwd, start, stop, suspend, restart, reset-data, purge."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dispatcher.cli.commands.inspection import describe_copy
from dispatcher.cli.commands.tokens import note_tokens
from dispatcher.cli.context import Cli, pass_cli
from dispatcher.cli.ui.progress import follow
from dispatcher.cli.ui.prompts import agent_argument, confirm, new_password, password_option, yes_option
from dispatcher.plugin.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json, ManagerClient

_F = TypeVar("_F", bound=Callable[..., Any])
STABLE = frozenset({"running", "suspended", "hibernated", "stopped"})


def wait_option(function: _F) -> _F:
    """Add ``--no-wait``."""
    option = click.option("--no-wait", "wait", flag_value=False, default=True, help="Return at once.")
    return option(function)


@click.command(
    epilog="\b\nExamples:\n  dispatcher add alice\n  dispatcher add alice --app notebook"
    "\n  pwgen 20 1 | tee /dev/tty | dispatcher add --password-stdin bob@example.org"
)
@agent_argument
@click.option("--app", metavar="APP", help="The agent's app; default: default_app of the configuration.")
@password_option
@click.option("--no-password", is_flag=True, help="Set no password: the user signs in with a plugin (LDAP, ...).")
@pass_cli
def add(cli: Cli, name: str, app: str | None, password_stdin: bool, no_password: bool) -> None:
    """Add the user NAME and an agent.  Checks everything else before it asks for a password.

    It asks only if `local` is the only authenticator.  To make a local user beside a directory, set the password
    with --password-stdin or `dispatcher passwd`.

    For an existing user, --app adds another agent, named NAME:APP, without asking for a password.
    """
    if password_stdin and no_password:
        raise click.UsageError("--password-stdin and --no-password cannot be used together")
    client = cli.client()
    if password_stdin:
        agent = client.create_agent(name, new_password(from_stdin=True), app)
    else:
        try:
            agent = client.create_agent(name, None, app)
        except BadRequest as error:
            # The manager checks everything else first, so nobody types a password in vain.
            if no_password or error.details.get("missing") != "password":
                raise
            agent = client.create_agent(name, new_password(from_stdin=False), app)
    cli.out.result(agent, f"{agent.get('name', name)} was added")


@click.command(epilog="\b\nExamples:\n  dispatcher remove alice\n  dispatcher remove --keep-data --yes alice")
@agent_argument
@click.option("--keep-data", is_flag=True, help="Keep the data for a later agent of the same name.")
@yes_option
@wait_option
@pass_cli
def remove(cli: Cli, name: str, keep_data: bool, yes: bool, wait: bool) -> None:
    """Stop and remove the agent NAME and delete its data.  The user is removed with the last agent."""
    cli.client().agent(name)
    confirm(f"Remove {name}{'' if keep_data else ' and all its data'}?", f"{name} was not removed", yes=yes)

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
    """Set the password of the user NAME and end the user's sessions.

    API tokens stay valid: `dispatcher tokens revoke --user NAME` ends those.
    """
    client = cli.client()
    # Checked before the password is typed.  A user may have only agents of other apps (NAME:APP).
    agents = [agent["name"] for agent in client.agents()["agents"] if name in (agent["name"], agent["user"])]
    if not agents:
        raise NotFound(f"There is no user {name}", fix="see `dispatcher list`")
    client.set_password(agents[0], new_password(from_stdin=password_stdin))
    cli.out.line(f"{name} has a new password")
    note_tokens(cli, agents[0].partition(":")[0])


@click.command(epilog="\b\nExamples:\n  dispatcher start alice\n  dispatcher start --no-wait alice:notebook")
@agent_argument
@wait_option
@pass_cli
def start(cli: Cli, name: str, wait: bool) -> None:
    """Start or wake the agent NAME and wait until it is ready."""
    _reach(cli, name, "running", wait)


@click.command(epilog="\b\nExample:\n  dispatcher stop alice")
@agent_argument
@wait_option
@pass_cli
def stop(cli: Cli, name: str, wait: bool) -> None:
    """Stop the agent NAME: with SIGTERM, later by force.  Its data stays."""
    _reach(cli, name, "stopped", wait)


@click.command(epilog="\b\nExamples:\n  dispatcher suspend alice\n  dispatcher suspend --to-disk alice")
@agent_argument
@click.option("--to-disk", is_flag=True, help="Save its memory to disk instead of RAM (hibernate).")
@wait_option
@pass_cli
def suspend(cli: Cli, name: str, to_disk: bool, wait: bool) -> None:
    """Suspend the agent NAME and keep its memory.  The next request wakes it."""
    _reach(cli, name, "hibernated" if to_disk else "suspended", wait)


@click.command(epilog="\b\nExample:\n  dispatcher restart alice")
@agent_argument
@wait_option
@pass_cli
def restart(cli: Cli, name: str, wait: bool) -> None:
    """Stop and start the agent NAME with the current configuration of its app.  Its data stays."""
    answer = follow(
        cli, name, lambda client, seconds: client.restart(name, wait=seconds), _is("running"), wait=wait
    )
    _print_state(cli, name, answer)


@click.command("reset-data", epilog="\b\nExample:\n  dispatcher reset-data --yes alice")
@agent_argument
@yes_option
@wait_option
@pass_cli
def reset_data(cli: Cli, name: str, yes: bool, wait: bool) -> None:
    """Stop the agent NAME, delete its data, and start it again if it was running."""
    cli.client().agent(name)
    confirm(f"Delete all data of {name}?", f"the data of {name} was not deleted", yes=yes)

    def send(client: ManagerClient, seconds: float | None) -> Json:
        return client.reset_data(name, wait=seconds)

    answer = follow(cli, name, send, lambda state: state.get("state") in STABLE, wait=wait)
    cli.out.result(answer, f"the data of {name} {'was' if wait else 'is being'} deleted")


def _reach(cli: Cli, name: str, state: str, wait: bool) -> None:
    def send(client: ManagerClient, seconds: float | None) -> Json:
        return client.set_state(name, state, wait=seconds)

    _print_state(cli, name, follow(cli, name, send, _is(state), wait=wait))


def _is(state: str) -> Callable[[Json], bool]:
    """Return whether a state satisfies a command.  An agent that has ended cannot be suspended any more."""
    good = {"suspended": {"suspended", "hibernated", "stopped"}, "hibernated": {"hibernated", "stopped"}}
    return lambda answer: answer.get("state") in good.get(state, {state})


def _print_state(cli: Cli, name: str, answer: Json) -> None:
    cli.out.result(answer, f"{name} is {answer.get('state', 'gone')}")


@click.command(epilog="\b\nExamples:\n  dispatcher purge alice\n  dispatcher purge --yes alice:notebook")
@agent_argument
@yes_option
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
        cli.out.line(describe_copy(copy))
    confirm(f"Delete this data of {name}?", "nothing was purged", yes=yes)
    purged = client.purge_copies(name)["purged"]
    text = f"{purged} {'copy' if purged == 1 else 'copies'} deleted"
    cli.out.result({"purged": purged, "copies": copies}, text)
