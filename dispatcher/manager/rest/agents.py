"""Role *admin*: agents."""

from __future__ import annotations

from urllib.parse import quote

from dispatcher.manager.agents.commands import desired_state
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.agents.views import AgentView, iso
from dispatcher.manager.rest import answers, schemas
from dispatcher.manager.rest.routing import Answer, Json, Routes
from dispatcher.manager.rest.services import Services
from dispatcher.manager.rest.waiting import wait, wait_for_state
from dispatcher.manager.storage.states import Desired
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, Conflict

_STATE = ("state", "desired", "stage", "detail", "fraction", "since", "failure", "outdated")
_STATE_ANSWERS = {200: answers.AgentState, 202: answers.AgentState}

routes = Routes()


@routes.add("GET", "/agents", {200: answers.AgentList})
def list_agents(services: Services, query: schemas.ListAgents) -> Json:
    """List agents, all or those in one state."""
    known = [state.value for state in State]
    if query.state is not None and query.state not in known:
        raise BadRequest(f"There is no state {names.printable(query.state)}", why=f"valid are: {', '.join(known)}")
    views = services.supervisor.queries.views()
    return {"agents": [view.to_json() for view in views if query.state in {None, view.state.value}]}


@routes.add("POST", "/agents", {201: answers.Agent})
def create_agent(services: Services, body: schemas.CreateAgent) -> Answer:
    """Create an agent, and its user when that is new."""
    name = names.agent_name(body.name)
    user = name.partition(":")[0]
    new = services.supervisor.store.get_user(user) is None
    if new and body.password is None and services.signin.local:
        raise BadRequest(
            f"The user {user} is new",
            why="no password was given",
            fix='give one; it can be left out only when `auth.authenticator` is not "local"',
        )
    if not new and body.password is not None:
        raise Conflict(
            f"{user} exists",
            why="the password was not changed, and no agent was created",
            fix="leave the password out to add an agent, or change it with `dispatcher passwd`",
        )
    password_hash = services.signin.hash_new(body.password) if body.password is not None else None
    row = services.supervisor.commands.create(name, app=body.app, password_hash=password_hash)
    if new:
        services.sessions.user_removed(user)  # sessions of an earlier user of that name are not the new user's
    location = {"Location": f"/agents/{quote(row.name, safe='')}"}
    return services.supervisor.queries.view(row.name).to_json(), 201, location


@routes.add("GET", "/agents/<agent>", {200: answers.Agent})
def get_agent(services: Services, agent: str) -> Json:
    """Show one agent."""
    return services.supervisor.queries.view(agent).to_json()


@routes.add("DELETE", "/agents/<agent>", {202: answers.Agent, 204: None})
def delete_agent(services: Services, agent: str, query: schemas.DeleteAgent) -> Answer:
    """Remove an agent with its data, or without; its user goes with the last one."""
    services.supervisor.commands.remove(agent, keep_data=query.data == "keep")
    view = wait(services, agent, lambda view: view is None or view.desired is not Desired.ABSENT, query.wait)
    return None if view is None else (view.to_json(), 202)


@routes.add("GET", "/agents/<agent>/state", {200: answers.AgentState})
def get_state(services: Services, agent: str) -> Json:
    """Show an agent's state."""
    return _state(services.supervisor.queries.view(agent))


@routes.add("PUT", "/agents/<agent>/state", _STATE_ANSWERS)
def set_state(services: Services, agent: str, body: schemas.SetState, query: schemas.Wait) -> Answer:
    """Set the desired state; the newest request wins."""
    services.supervisor.commands.set_desired(agent, desired_state(body.state))
    return _follow(services, agent, body.state, query.wait)


@routes.add("POST", "/agents/<agent>/restart", _STATE_ANSWERS)
def restart(services: Services, agent: str, query: schemas.Wait) -> Answer:
    """Stop an agent, renew it when it is outdated, start it."""
    services.supervisor.commands.restart(agent)
    return _follow(services, agent, Desired.RUNNING.value, query.wait)


@routes.add("PUT", "/agents/<agent>/reset_data", _STATE_ANSWERS)
def reset_data(services: Services, agent: str, query: schemas.Wait) -> Answer:
    """Stop an agent, delete its data, start it again if it ran."""
    services.supervisor.commands.reset_data(agent)
    return _follow(services, agent, services.supervisor.queries.view(agent).desired.value, query.wait)


def _follow(services: Services, agent: str, desired: str, seconds: float) -> Answer:
    """Return the state now, or wait for the desired one."""
    if not seconds:
        return _state(services.supervisor.queries.view(agent)), 202
    view, reached = wait_for_state(services, agent, desired, seconds)
    return _state(view), 200 if reached else 202


def _state(view: AgentView) -> Json:
    whole = view.to_json()
    return {name: whole[name] for name in _STATE}


@routes.add("GET", "/agents/<agent>/runtime", {200: answers.Runtime})
def runtime(services: Services, agent: str) -> Json:
    """Show where an agent runs and what it uses."""
    return services.supervisor.queries.runtime(agent)


@routes.add("GET", "/agents/<agent>/logs", {200: answers.Logs})
def logs(services: Services, agent: str, query: schemas.ReadLogs) -> Json:
    """Show an agent's last lines, or those after a cursor."""
    lines, cursor = services.supervisor.queries.logs(agent, tail=query.tail, after=query.after)
    return {"lines": lines, "cursor": cursor}


@routes.add("GET", "/agents/<agent>/events", {200: answers.Events})
def events(services: Services, agent: str, query: schemas.ListEvents) -> Json:
    """Show what happened to an agent, newest last."""
    found = services.supervisor.queries.events(agent, query.limit)
    return {"events": [{"time": iso(event.time), "kind": event.kind, "detail": event.detail} for event in found]}


@routes.add("POST", "/agents/<agent>/authenticate", {200: answers.User})
def authenticate(services: Services, agent: str, body: schemas.GivePassword) -> Json:
    """Check the password of an agent's user."""
    user = services.supervisor.queries.view(agent).user
    return {"user": services.signin.check(user, body.password, None)}


@routes.add("PUT", "/agents/<agent>/password", {204: None})
def set_password(services: Services, agent: str, body: schemas.GivePassword) -> None:
    """Change the password of an agent's user; ends the user's sessions."""
    user = services.supervisor.queries.view(agent).user
    services.signin.set_password(user, body.password)
    services.sessions.revoke_user(user)
    services.sync_edge()


@routes.add("GET", "/agents/<agent>/why", {200: answers.Why})
def why(services: Services, agent: str) -> Json:
    """Explain in sentences why an agent is in its state and what happens next."""
    return {"agent": agent, "sentences": services.supervisor.queries.why(agent)}


@routes.add("GET", "/agents/<agent>/copies", {200: answers.Copies})
def copies(services: Services, agent: str) -> Json:
    """List the data kept of an agent, or of a removed agent of this name."""
    return {"copies": services.supervisor.copies.list(agent)}


@routes.add("DELETE", "/agents/<agent>/copies", {200: answers.Purged})
def purge_copies(services: Services, agent: str) -> Json:
    """Delete the data kept of an agent, or of a removed agent of this name; never live data."""
    return {"purged": services.supervisor.copies.purge(agent)}
