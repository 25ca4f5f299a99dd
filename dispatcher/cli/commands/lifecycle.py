"""start, stop, suspend, restart, reset-data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.cli.ui.progress import follow
from dispatcher.cli.ui.prompts import agent_argument, confirm, yes_option

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json, ManagerClient

_F = TypeVar("_F", bound=Callable[..., Any])
STABLE = frozenset({"running", "suspended", "hibernated", "stopped"})


def wait_option(function: _F) -> _F:
    """Add ``--no-wait``."""
    option = click.option("--no-wait", "wait", flag_value=False, default=True, help="Return at once.")
    return option(function)


@click.command(epilog="\b\nExamples:\n  dispatcher start alice\n  dispatcher start --no-wait alice:notebook")
@agent_argument
@wait_option
@json_option
@pass_cli
def start(cli: Cli, name: str, wait: bool) -> None:
    """Start or wake the agent NAME and wait until it is ready."""
    _reach(cli, name, "running", wait)


@click.command(epilog="\b\nExample:\n  dispatcher stop alice")
@agent_argument
@wait_option
@json_option
@pass_cli
def stop(cli: Cli, name: str, wait: bool) -> None:
    """Stop the agent NAME: with SIGTERM, later by force.  Its data stays."""
    _reach(cli, name, "stopped", wait)


@click.command(epilog="\b\nExamples:\n  dispatcher suspend alice\n  dispatcher suspend --to-disk alice")
@agent_argument
@click.option("--to-disk", is_flag=True, help="Save its memory to disk instead of RAM (hibernate).")
@wait_option
@json_option
@pass_cli
def suspend(cli: Cli, name: str, to_disk: bool, wait: bool) -> None:
    """Suspend the agent NAME and keep its memory.  The next request wakes it."""
    _reach(cli, name, "hibernated" if to_disk else "suspended", wait)


@click.command(epilog="\b\nExample:\n  dispatcher restart alice")
@agent_argument
@wait_option
@json_option
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
@json_option
@pass_cli
def reset_data(cli: Cli, name: str, yes: bool, wait: bool) -> None:
    """Stop the agent NAME, delete its data, and start it again if it was running."""
    cli.client().agent(name)
    confirm(f"Delete all data of {name}?", yes=yes)

    def send(client: ManagerClient, seconds: float | None) -> Json:
        return client.reset_data(name, wait=seconds)

    answer = follow(cli, name, send, lambda state: state.get("state") in STABLE, wait=wait)
    cli.out.result(answer, f"the data of {name} {'was' if wait else 'is being'} deleted")


def _reach(cli: Cli, name: str, state: str, wait: bool) -> None:
    def send(client: ManagerClient, seconds: float | None) -> Json:
        return client.set_state(name, state, wait=seconds)

    _print_state(cli, name, follow(cli, name, send, _is(state), wait=wait))


def _is(state: str) -> Callable[[Json], bool]:
    return lambda answer: answer.get("state") == state


def _print_state(cli: Cli, name: str, answer: Json) -> None:
    cli.out.result(answer, f"{name} is {answer.get('state', 'gone')}")
