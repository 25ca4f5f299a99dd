"""Role *proxy*: what the portal may ask, always in the name of a session or of somebody who signs in.

A child session (subdomain routing) is for one agent's host, and that agent may come to hold its token: it knows
that agent alone, and changes nothing of its user's but that agent's state.
"""

from __future__ import annotations

from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.routing import Answer, Routes
from dispatcher.manager.rest.services import Json, Services
from dispatcher.manager.storage.auth import SessionRow, Visitor
from dispatcher.plugin import names
from dispatcher.plugin.errors import Forbidden

routes = Routes()


@routes.add("POST", "/sessions", body=schemas.Login, answers={201: "SignedIn"})
def sign_in(services: Services, body: schemas.Login) -> Answer:
    """Sign in: starts or wakes the user's agent, makes a session."""
    apps = services.config.apps
    signed_in = services.signin.sign_in(
        body.user,
        body.password,
        Visitor(address=body.address, user_agent=_line(body.user_agent)),
        body.device,
        frozenset(name for name, app in apps.items() if app.credentials == "stdin"),
    )
    session = services.session_json(signed_in.session)
    return Answer(201, {"token": signed_in.token, "device": signed_in.device, "session": session})


@routes.add("POST", "/sessions/lookup", body=schemas.OfSession, answers={200: "Session"})
def lookup(services: Services, body: schemas.OfSession) -> Json:
    """Show a session; 404 when it is dead or unknown."""
    return services.session_json(services.sessions.require(body.sha256))


@routes.add("POST", "/sessions/revoke", body=schemas.Revoke, answers={204: ""})
def revoke(services: Services, body: schemas.Revoke) -> Answer:
    """End a session (logout), or another one of the same user."""
    if body.id is None:
        row = services.sessions.get(body.sha256)
        services.sessions.revoke(row.parent or row.sha256 if row else body.sha256)
    else:
        user = _whole(services, body.sha256).user
        services.sessions.revoke(services.sessions.by_id(body.id, user).sha256)
    services.settle()
    return Answer(204)


@routes.add("POST", "/sessions/agents", body=schemas.OfSession, answers={200: "AgentList"})
def my_agents(services: Services, body: schemas.OfSession) -> Json:
    """List the agents of a session's user; a child session's own alone."""
    row = services.sessions.require(body.sha256)
    return {"agents": [view.to_json() for view in services.agents_of(row)]}


@routes.add("POST", "/sessions/select", body=schemas.Select, answers={200: "Session"})
def select(services: Services, body: schemas.Select) -> Json:
    """Send a session's requests to another agent of its user."""
    row = _whole(services, body.sha256)
    agent = services.own(row, names.agent_name(body.agent))
    return services.session_json(services.sessions.select(row.sha256, agent.name))


@routes.add("POST", "/sessions/state", body=schemas.MyState, answers={202: "Agent"})
def my_state(services: Services, body: schemas.MyState) -> Answer:
    """Start, stop or restart an agent of a session's user."""
    row = services.sessions.require(body.sha256)
    agent = services.own(row, names.agent_name(body.agent)).name
    if body.state == "restart":
        services.supervisor.restart(agent)
    else:
        services.supervisor.set_desired(agent, body.state)
    return Answer(202, services.supervisor.view(agent).to_json())


@routes.add("POST", "/sessions/list", body=schemas.OfSession, answers={200: "SessionList"})
def my_sessions(services: Services, body: schemas.OfSession) -> Json:
    """List the sessions of a session's user."""
    user = _whole(services, body.sha256).user
    return {"sessions": services.listed(services.sessions.all(user))}


@routes.add("POST", "/sessions/verify", body=schemas.Verify, answers={204: ""})
def verify(services: Services, body: schemas.Verify) -> Answer:
    """Check the password of a session's user again."""
    _verified(services, body)
    return Answer(204)


@routes.add("POST", "/sessions/password", body=schemas.ChangePassword, answers={200: "Renewed"})
def change_password(services: Services, body: schemas.ChangePassword) -> Json:
    """Change the password of a session's user: all other sessions end, this one is renewed."""
    user = _verified(services, body)
    services.signin.set_password(user, body.new_password)
    token, row = services.sessions.renew(body.sha256)
    services.settle()
    return {"token": token, "session": services.session_json(row)}


@routes.add("POST", "/sessions/handover", body=schemas.MakeHandover, answers={201: "Code"})
def handover(services: Services, body: schemas.MakeHandover) -> Answer:
    """Make a code that carries a sign-in to the host of one of the user's agents: once, within 30 seconds."""
    row = services.sessions.require(body.sha256)
    views = services.supervisor.views(user=row.user)
    agent = next((view.name for view in views if view.label == body.host.partition(".")[0]), None)
    if agent is None or row.parent:
        raise Forbidden("That host is not of an agent of yours", fix="open the app from the dashboard")
    now = services.clock.now()
    return Answer(201, {"code": services.handovers.issue(row.sha256, agent, body.host, body.nonce_sha256, now)})


@routes.add("POST", "/sessions/redeem", body=schemas.Redeem, answers={201: "Renewed"})
def redeem(services: Services, body: schemas.Redeem) -> Answer:
    """Turn a code into a session for its host, which ends with its parent."""
    found = services.handovers.redeem(body.code, body.nonce, body.host, services.clock.now())
    parent = services.sessions.get(found.parent)
    if parent is None:
        raise Forbidden("The sign-in has ended", fix="sign in again")
    token, row = services.sessions.child(parent, found.host, found.agent)
    return Answer(201, {"token": token, "session": services.session_json(row)})


def _verified(services: Services, body: schemas.Verify) -> str:
    user = _whole(services, body.sha256).user
    services.signin.check(user, body.password, body.address)
    return user


def _whole(services: Services, sha256: str) -> SessionRow:
    """Return a session that is for all of its user's affairs.

    :raises NotFound: it is dead; :raises Forbidden: it is for one agent's host.
    """
    row = services.sessions.require(sha256)
    if row.parent:
        raise Forbidden("This sign-in is for one app alone", fix="go to your list of apps")
    return row


def _line(text: str) -> str:
    """Return what a browser says of itself as one bounded, printable line."""
    return "".join(char if char.isprintable() else " " for char in text)[:256]
