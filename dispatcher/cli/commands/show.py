"""list, running, info."""

from __future__ import annotations

from typing import Any

import click

from dispatcher.cli.commands.purge import describe
from dispatcher.cli.context import Cli, json_option, pass_cli
from dispatcher.cli.ui.prompts import agent_argument
from dispatcher.common import humanize
from dispatcher.plugin.errors import NotFound


@click.command("list", epilog="\b\nExamples:\n  dispatcher list\n  dispatcher list --json | jq '.agents[].name'")
@click.option("--state", metavar="STATE", help="Only those that are running, stopped, failed, ...")
@json_option
@pass_cli
def list_agents(cli: Cli, state: str | None) -> None:
    """List all agents with app, provider, state and last use."""
    found = cli.client().agents(state)
    cli.out.table(
        found,
        ["NAME", "APP", "PROVIDER", "STATE", "SINCE", "LAST USED", ""],
        (
            [
                agent["name"],
                agent["app"],
                agent["provider"],
                agent["state"],
                humanize.ago(agent.get("since"), never=""),
                humanize.ago(agent.get("last_used")),
                remark(agent),
            ]
            for agent in found["agents"]
        ),
        empty="there are no agents (add one: dispatcher add NAME)",
        least=("PROVIDER", "APP", "SINCE", "LAST USED"),
    )


@click.command(epilog="\b\nExample:\n  dispatcher running")
@json_option
@pass_cli
def running(cli: Cli) -> None:
    """List the agents that run."""
    found = cli.client().agents("running")
    cli.out.table(
        found,
        ["NAME", "APP", "PROVIDER", "SINCE"],
        (
            [
                agent["name"],
                agent["app"],
                agent["provider"],
                humanize.ago(agent.get("since")),
            ]
            for agent in found["agents"]
        ),
        empty="no agent is running",
        least=("PROVIDER", "APP"),
    )


@click.command(epilog="\b\nExample:\n  dispatcher info alice")
@agent_argument
@json_option
@pass_cli
def info(cli: Cli, name: str) -> None:
    """Show everything about the agent NAME: state, usage, failure, and kept data."""
    client = cli.client()
    copies = client.copies(name)["copies"]
    try:
        agent = client.agent(name)
        runtime = client.runtime(name)
    except NotFound:
        if not copies:
            raise
        agent, runtime = {"name": name, "state": "absent"}, {}  # removed, its data kept
    if cli.out.json:
        cli.out.data({**agent, "runtime": runtime, "copies": copies})
        return
    usage = runtime.get("usage") or {}
    values: dict[str, object] = {
        "name": agent["name"],
        "user": agent.get("user"),
        "app": agent.get("app"),
        "provider": agent.get("provider"),
        "state": agent["state"],
        "desired": agent.get("desired"),
        "doing": " ".join(str(agent[key]) for key in ("stage", "detail") if agent.get(key)),
        "since": agent.get("since"),
        "created": agent.get("created"),
        "last used": agent.get("last_used") or ("never" if runtime else ""),
        "outdated": "yes, `restart` applies the new configuration" if agent.get("outdated") else "",
        "backend": "" if agent.get("reachable", True) else f"not reachable, as of {agent.get('observed_at')}",
        "move": agent.get("move"),
        "endpoint": runtime.get("endpoint"),
        "user id": runtime.get("uid"),
        "started": runtime.get("started_at"),
        "memory": humanize.size(usage["memory"]) if usage.get("memory") is not None else "",
        "CPU": f"{usage['cpu_seconds']:.1f} s" if usage.get("cpu_seconds") is not None else "",
        "disk": humanize.size(usage["disk"]) if usage.get("disk") is not None else "",
    }
    failure = agent.get("failure") or {}
    values |= {"failure": failure.get("what"), "why": failure.get("why"), "what to do": failure.get("fix")}
    cli.out.pairs(values)
    for line in failure.get("log") or ():
        cli.out.line(f"  | {line}")
    if copies:
        cli.out.line(f"kept data (`dispatcher purge {name}` deletes it):")
    for copy in copies:
        cli.out.line(f"  {describe(copy)}")


def remark(agent: dict[str, Any]) -> str:
    """Return the last column of a list: the failure, the step in progress, or what else is unusual."""
    if agent.get("failure"):
        return str(agent["failure"].get("what") or "")
    if agent.get("stage"):
        return str(agent["stage"])
    if agent.get("reachable") is False:
        return "backend not reachable"
    return "outdated" if agent.get("outdated") else ""
