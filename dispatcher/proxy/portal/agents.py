"""A user's apps: the dashboard, their states as JSON, starting and stopping."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from dispatcher.common import humanize
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest
from dispatcher.proxy.portal import context, redirect_targets, responses, words

pages = Blueprint("agents", __name__)

#: Action of a form -> state to request from the manager.
ACTIONS = {"start": "running", "stop": "stopped", "restart": "restart"}


@pages.get("/")
def dashboard() -> Response:
    """Show a user's apps."""
    if context.on_agent_host():
        return context.go(context.portal().public_origin + context.local("/"))
    someone = context.signed_in()
    agents = context.portal().client.my_agents(someone.sha256)["agents"]
    if responses.for_programs():
        return _status(someone, agents)
    shown = [_shown(agent, someone) for agent in agents]
    ask = responses.ask_administrator()
    return responses.page("dashboard.html", someone=someone, agents=shown, ask_administrator=ask)


@pages.get("/replaced")
def replaced() -> Response:
    """Say why a page of an app was replaced by this one."""
    return responses.page("replaced.html")


@pages.get("/status")
def status() -> Response:
    """Return the states of a user's apps, for the pages' scripts and for programs."""
    someone = context.signed_in()
    return _status(someone, context.portal().client.my_agents(someone.sha256)["agents"])


@pages.post("/agents")
def act() -> Response:
    """Open, start, stop or restart one of a user's apps."""
    context.check_form("agents")
    someone = context.signed_in()
    name, action = context.sent("agent", names.MAX_NAME * 2), context.sent("action")
    target = redirect_targets.own_path(context.sent("next", redirect_targets.MAX_TARGET), context.portal().prefix)
    client = context.portal().client
    if action == "open" and responses.for_people() and (question := _ask(someone, name, target)):
        return question
    if action in {"open", "switch"}:
        client.select(someone.sha256, name)
        if responses.for_programs():
            return responses.data({"agent": name})
        response = context.go(target)
        response.headers["Clear-Site-Data"] = '"cache"'  # the last app's pages are of the same address
        # Over plain HTTP browsers ignore that, but the agents' answers have `Vary: Cookie`.
        context.set_cookie(response, context.portal().cookies.app, context.sha256(name)[:16], None)
        return response
    if action not in ACTIONS:
        raise BadRequest("Nothing to do", why="valid actions are open, start, stop, restart")
    agent = client.my_state(someone.sha256, name, ACTIONS[action])
    if responses.for_programs():
        return responses.data(words.public_agent(agent), 202)
    return context.go(target if context.sent("next") else context.local("/"))


def _ask(someone: context.Person, name: str, target: str) -> Response | None:
    """Ask before another app takes over the address, None if there is none before it."""
    agents = {each["name"]: each for each in context.portal().client.my_agents(someone.sha256)["agents"]}
    if context.portal().subdomains or name == someone.agent or not {name, someone.agent} <= agents.keys():
        return None
    before, after = (context.portal().title(agents[each]["app"]) for each in (someone.agent, name))
    heading = f"Open {after}?"
    return responses.page("others.html", heading=heading, agent=name, before=before, after=after, target=target)


def _status(someone: context.Person, agents: list[dict[str, Any]]) -> Response:
    shown = [words.public_agent(agent) for agent in agents]
    return responses.data({"user": someone.user, "agent": someone.agent, "agents": shown})


def _shown(agent: dict[str, Any], someone: context.Person) -> dict[str, Any]:
    """Return an agent's values for the dashboard's template."""
    label, tone = words.state(agent["state"])
    since = words.since(agent.get("since"), event=agent["state"] == "failed")
    portal = context.portal()
    own = agent["name"] == someone.agent
    facts = [
        "Selected" if own and not portal.subdomains and len(someone.agents) > 1 else "",
        agent["name"] if agent["name"] != someone.user else "",
        f"{label} {since}" if since else "",
        f"Used {humanize.ago(agent['last_used'])}" if agent.get("last_used") else "Never used",
        _data(agent.get("disk")),
        "A restart applies the new configuration" if agent.get("outdated") else "",
    ]
    scheme, _, host = portal.public_origin.partition("://")
    address = f"{scheme}://{names.key(agent['name'])}.{host}/" if portal.subdomains else "/" if own else ""
    return {
        "agent": words.public_agent(agent),
        "title": portal.title(agent["app"]),
        "label": label,
        "tone": tone,
        "address": address,
        "asleep": agent["state"] in words.ASLEEP,
        "stopped": agent["state"] in {"stopped", "failed"},
        "facts": [fact for fact in facts if fact],
    }


def _data(disk: dict[str, Any] | None) -> str:
    """Return what an agent's data takes, in words; "" if unknown."""
    if not disk:
        return ""
    text = f"Data: {humanize.share(disk['used'], disk['limit'])}"
    return f"{text}, full: delete files to go on" if disk["full"] else text
