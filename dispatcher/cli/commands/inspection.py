"""list, running, info, logs, why, top, memory-usage, sessions list, sessions revoke."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from dispatcher.cli.commands.tokens import note_tokens
from dispatcher.cli.context import Cli, pass_cli
from dispatcher.cli.ui.output import Output, clean
from dispatcher.cli.ui.prompts import agent_argument
from dispatcher.common import humanize
from dispatcher.plugin import names
from dispatcher.plugin.errors import NotFound

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json

#: Of a request: the edge's own, or of a front proxy; an agent may have such a name.
_REQUEST_ID = re.compile(r"(?=.*[0-9])[0-9a-f-]{16,64}")
INTERVAL = 0.5  # seconds between two requests of `logs -f`


@click.command("list", epilog="\b\nExamples:\n  dispatcher list\n  dispatcher list --json | jq '.agents[].name'")
@click.option("--state", metavar="STATE", help="Only those that are running, stopped, failed, ...")
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
        "data": humanize.share(usage.get("disk"), usage.get("disk_limit")),
    }
    failure = agent.get("failure") or {}
    values |= {"failure": failure.get("what"), "why": failure.get("why"), "what to do": failure.get("fix")}
    cli.out.pairs(values)
    if failure.get("log"):
        cli.out.line("\nlast lines of its log:")
    for line in failure.get("log") or ():
        cli.out.line(f"  | {line}")
    if copies:
        cli.out.line(f"\nkept data (`dispatcher purge {name}` deletes it):")
    for copy in copies:
        cli.out.line(f"  {describe_copy(copy)}")


def remark(agent: dict[str, Any]) -> str:
    """Return the last column of a list: the failure, the step in progress, or what else is unusual."""
    if agent.get("failure"):
        return str(agent["failure"].get("what") or "")
    if agent.get("stage"):
        return str(agent["stage"])
    if agent.get("reachable") is False:
        return "backend not reachable"
    return "outdated" if agent.get("outdated") else ""


def describe_copy(copy: Json) -> str:
    """Return one line about kept data: its size, since when it is kept, and why."""
    size = "size unknown" if copy["size"] is None else humanize.size(copy["size"])
    since = f"{copy['time'][:10]} ({humanize.ago(copy['time'])})"
    return f"{size} in {copy['provider']}, kept since {since}: {copy['why']}"


@click.command(epilog="\b\nExamples:\n  dispatcher logs alice\n  dispatcher logs -f -n 20 alice")
@agent_argument
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they come, until Ctrl-C.")
@click.option(
    "-n",
    "--tail",
    metavar="N",
    type=click.IntRange(0, 100_000),
    default=100,
    show_default=True,
    help="Number of lines.",
)
@pass_cli
def logs(cli: Cli, name: str, follow: bool, tail: int) -> None:
    """Show the last lines of output of the agent NAME."""
    client = cli.client()
    answer = client.logs(name, tail=tail)
    if cli.out.json and not follow:
        cli.out.data(answer)
        return
    # An agent's output must not control a terminal; a file or a program gets it unchanged.
    show = clean if sys.stdout.isatty() else str
    while True:
        for line in answer["lines"]:
            click.echo(show(line))
        if not follow:
            return
        sys.stdout.flush()
        if not answer["lines"]:
            time.sleep(INTERVAL)
        answer = client.logs(name, tail=10_000, after=answer["cursor"])


@click.command(epilog="\b\nExample:\n  dispatcher why alice")
@agent_argument
@pass_cli
def why(cli: Cli, name: str) -> None:
    """Explain the state of the agent NAME: cause, history, what comes next.

    NAME can also be the request ID from an error page: then it says which log has the reason.
    """
    client = cli.client()
    copies: list[Json] = []
    try:
        copies = client.copies(name)["copies"]
        answer = client.why(name)
    except NotFound as error:
        if not copies and _REQUEST_ID.fullmatch(name):
            raise NotFound(
                error.what,
                why="it looks like the ID of a request",
                fix="the proxy's log names it next to the reason: "
                f"`journalctl -u dispatcher-proxy --grep {name}`, or the output of `dispatcher serve`; "
                "the file proxy.access_log has all requests",
            ) from error
        if not copies:
            raise
        answer = {"agent": name, "sentences": [f"{error.what}."]}
    kept = [f"Data is kept: {describe_copy(copy)}." for copy in copies]
    if kept:
        kept.append(f"`dispatcher purge {name}` deletes the kept data.")
    cli.out.result(
        {**answer, "sentences": [*answer["sentences"], *kept]}, "\n".join([*answer["sentences"], *kept])
    )


@click.command(epilog="\b\nExamples:\n  dispatcher top\n  dispatcher top --once --sort cpu")
@click.option("--once", is_flag=True, help="Print one table and exit; the default without a terminal.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(0.5, 3600),
    default=2.0,
    show_default=True,
    help="Time between two tables.",
)
@click.option(
    "--sort",
    type=click.Choice(["memory", "cpu", "name"]),
    default="memory",
    show_default=True,
    help="Column to sort by.",
)
@pass_cli
def top(cli: Cli, once: bool, interval: float, sort: str) -> None:
    """Show the memory, CPU time and data of agents, refreshed until Ctrl-C."""
    client = cli.client()
    live = sys.stdout.isatty() and not once and not cli.out.json
    while True:
        found = client.top()
        if live:
            click.clear()
        _usage_table(cli.out, found, sort)
        if not live:
            return
        try:
            time.sleep(interval)
        except KeyboardInterrupt:
            return


def _usage_table(out: Output, found: Json, sort: str) -> None:
    def key(agent: Json) -> tuple[float, str]:
        used = agent.get({"memory": "memory", "cpu": "cpu_percent"}.get(sort, "")) or 0.0
        return -float(used), agent["name"]

    out.table(
        found,
        ["NAME", "STATE", "MEMORY>", "CPU %>", "CPU TIME>", "DATA>", "LAST USED"],
        (
            [
                agent["name"],
                agent["state"],
                humanize.size(agent.get("memory")),
                "-" if agent.get("cpu_percent") is None else f"{agent['cpu_percent']:.1f}",
                humanize.short_duration(agent.get("cpu_seconds")),
                humanize.share(agent.get("disk"), agent.get("disk_limit")) or "-",
                humanize.ago(agent.get("last_used")),
            ]
            for agent in sorted(found["agents"], key=key)
        ),
        empty="no agent is running",
        least=("LAST USED", "CPU TIME", "DATA", "STATE"),
    )


@click.command("memory-usage", epilog="\b\nExample:\n  dispatcher memory-usage")
@pass_cli
def memory_usage(cli: Cli) -> None:
    """Show the memory of running agents: of each, the total and the average."""
    found = cli.client().memory_usage()
    agents = sorted(found["agents"], key=lambda agent: -(agent.get("memory") or 0))
    rows = [[agent["name"], humanize.size(agent.get("memory"))] for agent in agents]
    if rows:
        rows += [["total", humanize.size(found["total"])], ["average", humanize.size(found["average"])]]
    cli.out.table(found, ["NAME", "MEMORY>"], rows, empty="no agent is running")


@click.group(epilog="\b\nExamples:\n  dispatcher sessions list\n  dispatcher sessions revoke --user alice")
def sessions() -> None:
    """List and end sessions (sign-ins of users)."""


@sessions.command("list", epilog="\b\nExample:\n  dispatcher sessions list --user alice")
@click.option("--user", metavar="NAME", help="Only those of this user.")
@pass_cli
def list_sessions(cli: Cli, user: str | None) -> None:
    """List the sessions with user, address and time."""
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
        empty="no sessions",
        least=("BROWSER", "AGENT", "ADDRESS", "SIGNED IN"),
    )


@sessions.command(
    epilog="\b\nExamples:\n  dispatcher sessions revoke 0123456789abcdef"
    "\n  dispatcher sessions revoke --user alice"
)
@click.argument("session", metavar="[ID]", required=False)
@click.option("--user", metavar="NAME", help="All those of this user.")
@pass_cli
def revoke(cli: Cli, session: str | None, user: str | None) -> None:
    """End the session ID, or all sessions of a user, and close their connections.

    API tokens stay valid: `dispatcher tokens revoke --user NAME` ends those.
    """
    if (session is None) == (user is None):
        raise click.UsageError("Give the ID of one session, or --user NAME")
    client = cli.client()
    if user is not None:
        name = names.user_name(user)
        count = int(client.revoke_sessions(name).get("revoked", 0))
        note_tokens(cli, name)
    else:
        client.revoke_session(session or "")
        count = 1
    if cli.out.json:
        cli.out.data({"revoked": count})
    else:
        cli.out.line(f"{count} session{'' if count == 1 else 's'} ended")
