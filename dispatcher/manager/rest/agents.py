"""Role *admin*: agents."""

from __future__ import annotations

from urllib.parse import quote

from dispatcher.manager.agents.lifecycle import Desired, State
from dispatcher.manager.agents.views import iso
from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.routing import Answer, Routes
from dispatcher.manager.rest.services import Json, Services, outcome, settled, state_json
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, Conflict

routes = Routes()


@routes.add("GET", "/agents", query=schemas.ListAgents, answers={200: "AgentList"})
def list_agents(services: Services, query: schemas.ListAgents) -> Json:
    """List agents, all or those in one state."""
    known = [state.value for state in State]
    if query.state is not None and query.state not in known:
        raise BadRequest(f"There is no state {names.printable(query.state)}", why=f"valid are: {', '.join(known)}")
    views = services.supervisor.views()
    return {"agents": [view.to_json() for view in views if query.state in {None, view.state.value}]}


@routes.add("POST", "/agents", body=schemas.CreateAgent, answers={201: "Agent"})
def create_agent(services: Services, body: schemas.CreateAgent) -> Answer:
    """Create an agent, and its user when that is new."""
    name = names.agent_name(body.name)
    user = name.partition(":")[0]
    store = services.supervisor.store
    new = store.get_user(user) is None
    if new and body.password is None and services.signin.local:
        raise BadRequest(
            f"The user {user} is new",
            why="no password was given",
            fix='give one; none is needed only where `auth.authenticator` is another than "local"',
        )
    if not new and body.password is not None:
        raise Conflict(
            f"{user} exists",
            why="the password was not changed, and no agent made",
            fix="leave the password out to add an agent, or change it with `dispatcher passwd`",
        )
    password_hash = services.signin.hash_new(body.password) if body.password is not None else None
    row = services.supervisor.create(name, app=body.app, password_hash=password_hash)
    if new:
        services.sessions.user_gone(user)  # nobody who was signed in under that name before is signed in now
    view = services.supervisor.view(row.name)
    return Answer(201, view.to_json(), {"Location": f"/agents/{quote(row.name, safe='')}"})


@routes.add("GET", "/agents/<agent>", answers={200: "Agent"})
def get_agent(services: Services, agent: str) -> Json:
    """Show one agent."""
    return services.supervisor.view(agent).to_json()


@routes.add("DELETE", "/agents/<agent>", query=schemas.DeleteAgent, answers={202: "Agent", 204: ""})
def delete_agent(services: Services, agent: str, query: schemas.DeleteAgent) -> Answer:
    """Remove an agent with its data, or without; its user goes with the last one."""
    going = services.supervisor.view(agent)
    user = going.user

    def stay(but: str = "") -> bool:
        views = services.supervisor.views(user=user)
        return any(view.desired is not Desired.ABSENT and view.name != but for view in views)

    if not stay(but=going.name):  # whoever is there is told so, before the app just breaks off
        services.sessions.user_gone(user)
        services.settle()
    services.supervisor.remove(agent, keep_data=query.data == "keep")
    if not stay():
        services.sessions.user_gone(user)
    view = services.wait(agent, lambda view: view is None or view.desired is not Desired.ABSENT, query.wait)
    return Answer(204) if view is None else Answer(202, view.to_json())


@routes.add("GET", "/agents/<agent>/state", answers={200: "State"})
def get_state(services: Services, agent: str) -> Json:
    """Show an agent's state."""
    return state_json(services.supervisor.view(agent))


@routes.add(
    "PUT", "/agents/<agent>/state", body=schemas.SetState, query=schemas.Wait, answers={200: "State", 202: "State"}
)
def set_state(services: Services, agent: str, body: schemas.SetState, query: schemas.Wait) -> Answer:
    """Ask for a state; the newest request wins."""
    services.supervisor.set_desired(agent, body.state)
    return _follow(services, agent, body.state, query.wait)


@routes.add("POST", "/agents/<agent>/restart", query=schemas.Wait, answers={200: "State", 202: "State"})
def restart(services: Services, agent: str, query: schemas.Wait) -> Answer:
    """Stop an agent, renew it when it is outdated, start it."""
    services.supervisor.restart(agent)
    return _follow(services, agent, Desired.RUNNING.value, query.wait)


@routes.add("PUT", "/agents/<agent>/reset_data", query=schemas.Wait, answers={200: "State", 202: "State"})
def reset_data(services: Services, agent: str, query: schemas.Wait) -> Answer:
    """Stop an agent, delete its data, start it again if it ran."""
    services.supervisor.reset_data(agent)
    return _follow(services, agent, services.supervisor.view(agent).desired.value, query.wait)


def _follow(services: Services, agent: str, wanted: str, seconds: float) -> Answer:
    """Answer with the state now, or wait for the end."""
    if not seconds:
        return Answer(202, state_json(services.supervisor.view(agent)))
    view = services.wait(agent, settled(wanted), seconds)
    reached = outcome(agent, view, wanted)
    assert view is not None
    return Answer(200 if reached else 202, state_json(view))


@routes.add("GET", "/agents/<agent>/runtime", answers={200: "Runtime"})
def runtime(services: Services, agent: str) -> Json:
    """Show where an agent runs and what it uses."""
    return services.supervisor.runtime(agent)


@routes.add("GET", "/agents/<agent>/logs", query=schemas.Logs, answers={200: "Logs"})
def logs(services: Services, agent: str, query: schemas.Logs) -> Json:
    """Show an agent's last lines, or those after a cursor."""
    lines, cursor = services.supervisor.logs(agent, tail=query.tail, after=query.after)
    return {"lines": lines, "cursor": cursor}


@routes.add("GET", "/agents/<agent>/events", query=schemas.Events, answers={200: "Events"})
def events(services: Services, agent: str, query: schemas.Events) -> Json:
    """Show what happened to an agent, newest last."""
    found = services.supervisor.events(agent, query.limit)
    return {"events": [{"time": iso(event.time), "kind": event.kind, "detail": event.detail} for event in found]}


@routes.add("POST", "/agents/<agent>/authenticate", body=schemas.GivePassword, answers={200: "User"})
def authenticate(services: Services, agent: str, body: schemas.GivePassword) -> Json:
    """Check the password of an agent's user."""
    return {"user": services.signin.check(services.user_of(agent), body.password, None)}


@routes.add("PUT", "/agents/<agent>/password", body=schemas.GivePassword, answers={204: ""})
def set_password(services: Services, agent: str, body: schemas.GivePassword) -> Answer:
    """Change the password of an agent's user; ends the user's sessions."""
    user = services.user_of(agent)
    services.signin.set_password(user, body.password)
    services.sessions.revoke_user(user)
    services.settle()
    return Answer(204)


@routes.add("GET", "/agents/<agent>/why", answers={200: "Why"})
def why(services: Services, agent: str) -> Json:
    """Say in sentences why an agent is in its state and what happens next."""
    return {"agent": agent, "sentences": services.supervisor.why(agent)}


@routes.add("GET", "/agents/<agent>/copies", answers={200: "Copies"})
def copies(services: Services, agent: str) -> Json:
    """List the data kept of an agent, or of a removed agent of this name."""
    return {"copies": services.supervisor.copies(agent)}


@routes.add("DELETE", "/agents/<agent>/copies", answers={200: "Purged"})
def purge_copies(services: Services, agent: str) -> Json:
    """Delete the data kept of an agent, or of a removed agent of this name; never live data."""
    return {"purged": services.supervisor.purge_copies(agent)}
