"""Role *admin*: `/agents` and `/agents/NAME/...` (state, logs, events, copies)."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import Field

from dispatcher.manager.agents.agent import AgentView, iso
from dispatcher.manager.agents.commands import desired_state
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.long_poll import wait_for_state, wait_until
from dispatcher.manager.rest.routing import Answer, Json, Routes
from dispatcher.manager.rest.services import Services
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, Conflict, NotFound

_STATE = ("state", "desired", "stage", "detail", "fraction", "since", "failure", "outdated")
_STATE_ANSWERS = {200: schemas.AgentState, 202: schemas.AgentState}

routes = Routes()


@routes.add("GET", "/agents", {200: schemas.AgentList})
def list_agents(services: Services, state: Annotated[str, Field(max_length=32)] | None = None) -> Json:
    """List agents, all or those in one state."""
    known = [each.value for each in State]
    if state is not None and state not in known:
        raise BadRequest(f"There is no state {names.printable(state)}", why=f"valid are: {', '.join(known)}")
    views = services.supervisor.queries.views()
    return {"agents": [view.to_json() for view in views if state in {None, view.state.value}]}


@routes.add("POST", "/agents", {201: schemas.Agent})
def create_agent(
    services: Services,
    name: schemas.Name,
    password: schemas.Password | None = None,
    app: schemas.App | None = None,
) -> Answer:
    """Create an agent, and its user when that is new."""
    name = names.agent_name(name)
    user = name.partition(":")[0]
    commands = services.supervisor.commands
    new = services.supervisor.store.get_user(user) is None
    if not new and password is not None:
        commands.check_not_being_removed(name)
        raise Conflict(
            f"{user} exists",
            why="the password was not changed, and no agent was created",
            fix="leave the password out to add an agent, or change it with `dispatcher passwd`",
        )
    commands.check_new(name, app)
    if new and password is None and not services.signin.authenticators.external:
        raise BadRequest(
            f"The user {user} is new",
            why="no password was given",
            fix='give one; it can be left out only when `auth.authenticator` is not "local"',
            details={"missing": "password"},
        )
    password_hash = services.signin.hash_new(password) if password is not None else None
    row = commands.create(name, app=app, password_hash=password_hash)
    location = {"Location": f"/agents/{quote(row.name, safe='')}"}
    return services.supervisor.queries.view(row.name).to_json(), 201, location


@routes.add("GET", "/agents/<agent>", {200: schemas.Agent})
def get_agent(services: Services, agent: str) -> Json:
    """Show one agent."""
    return services.supervisor.queries.measured(agent).to_json()


@routes.add("DELETE", "/agents/<agent>", {202: schemas.Agent, 204: None})
def delete_agent(
    services: Services, agent: str, data: Literal["keep", "delete"] = "delete", wait: schemas.Wait = 0.0
) -> Answer:
    """Remove an agent with its data, or without; its user goes with the last one."""
    services.supervisor.commands.remove(agent, keep_data=data == "keep")
    view = wait_until(
        services,
        agent,
        lambda view: view is None or view.desired is not Desired.ABSENT or view.failure is not None,
        wait,
    )
    return None if view is None else (view.to_json(), 202)


@routes.add("GET", "/agents/<agent>/state", {200: schemas.AgentState})
def get_state(services: Services, agent: str) -> Json:
    """Show an agent's state."""
    return _state(services.supervisor.queries.view(agent))


@routes.add("PUT", "/agents/<agent>/state", _STATE_ANSWERS)
def set_state(
    services: Services,
    agent: str,
    state: Literal["running", "suspended", "hibernated", "stopped"],
    wait: schemas.Wait = 0.0,
) -> Answer:
    """Set the desired state; the newest request wins."""
    services.supervisor.commands.set_desired(agent, desired_state(state))
    return _follow(services, agent, state, wait)


@routes.add("POST", "/agents/<agent>/restart", _STATE_ANSWERS)
def restart(services: Services, agent: str, wait: schemas.Wait = 0.0) -> Answer:
    """Stop an agent, renew it when it is outdated, start it."""
    services.supervisor.commands.restart(agent)
    return _follow(services, agent, Desired.RUNNING.value, wait)


@routes.add("PUT", "/agents/<agent>/reset_data", _STATE_ANSWERS)
def reset_data(services: Services, agent: str, wait: schemas.Wait = 0.0) -> Answer:
    """Stop an agent, delete its data, start it again if it ran."""
    services.supervisor.commands.reset_data(agent)
    return _follow(services, agent, services.supervisor.queries.view(agent).desired.value, wait)


def _follow(services: Services, agent: str, desired: str, seconds: float) -> Answer:
    """Return the state now, or wait for the desired one."""
    if not seconds:
        return _state(services.supervisor.queries.view(agent)), 202
    view, reached = wait_for_state(services, agent, desired, seconds)
    return _state(view), 200 if reached else 202


def _state(view: AgentView) -> Json:
    whole = view.to_json()
    return {name: whole[name] for name in _STATE}


@routes.add("GET", "/agents/<agent>/runtime", {200: schemas.Runtime})
def runtime(services: Services, agent: str) -> Json:
    """Show where an agent runs and what it uses."""
    return services.supervisor.queries.runtime(agent)


@routes.add("GET", "/agents/<agent>/logs", {200: schemas.Logs}, scope="admin")  # apps print secrets
def logs(
    services: Services,
    agent: str,
    tail: Annotated[int, Field(ge=0, le=10_000)] = 100,
    after: Annotated[str, Field(max_length=200)] | None = None,
) -> Json:
    """Show an agent's last lines, or those after a cursor."""
    lines, cursor = services.supervisor.queries.logs(agent, tail=tail, after=after)
    return {"lines": lines, "cursor": cursor}


@routes.add("GET", "/agents/<agent>/events", {200: schemas.Events})
def events(services: Services, agent: str, limit: Annotated[int, Field(ge=1, le=10_000)] = 100) -> Json:
    """Show what happened to an agent, newest last."""
    found = services.supervisor.queries.events(agent, limit)
    return {"events": [{"time": iso(event.time), "kind": event.kind, "detail": event.detail} for event in found]}


@routes.add("POST", "/agents/<agent>/authenticate", {200: schemas.CheckedUser})
def authenticate(services: Services, agent: str, password: schemas.Password) -> Json:
    """Check the password of an agent's user."""
    user = services.supervisor.queries.view(agent).user
    return {"user": services.signin.check(user, password, None)}


@routes.add("PUT", "/agents/<agent>/password", {204: None})
def set_password(services: Services, agent: str, password: schemas.Password) -> None:
    """Change the password of an agent's user; ends the user's sessions."""
    user = services.supervisor.queries.view(agent).user
    services.signin.set_password(user, password)
    services.sessions.revoke_user(user)
    services.sync_edge()


@routes.add("GET", "/agents/<agent>/why", {200: schemas.Why})
def why(services: Services, agent: str) -> Json:
    """Explain in sentences why an agent is in its state and what happens next."""
    store = services.supervisor.store
    kept = len(store.copies(agent)) + (store.kept(agent) is not None)
    try:
        sentences = services.supervisor.queries.why(agent)
    except NotFound:
        if not kept:
            raise
        sentences = ["The agent was removed."]
    if kept:
        what = "One copy of its data is" if kept == 1 else f"{kept} copies of its data are"
        sentences.append(
            f"{what} kept: `dispatcher info {agent}` shows it, `dispatcher purge {agent}` deletes it."
        )
    return {"agent": agent, "sentences": sentences}


@routes.add("GET", "/agents/<agent>/copies", {200: schemas.Copies})
def copies(services: Services, agent: str) -> Json:
    """List the data kept of an agent, or of a removed agent of this name."""
    return {"copies": services.supervisor.copies.list(agent)}


@routes.add("DELETE", "/agents/<agent>/copies", {200: schemas.Purged})
def purge_copies(services: Services, agent: str) -> Json:
    """Delete the data kept of an agent, or of a removed agent of this name; never live data."""
    return {"purged": services.supervisor.copies.purge(agent)}
