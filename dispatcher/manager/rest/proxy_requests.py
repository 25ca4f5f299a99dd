"""Role *proxy*: the portal's requests, always on behalf of a session or of a user who signs in.

A child session (subdomain routing) is for one agent's host, and that agent can obtain its token: it gives access
to that agent alone, and cannot change anything of the user but that agent's state.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dispatcher.common.api_tokens import DEFAULT_EXPIRY
from dispatcher.manager.agents.agent import AgentView
from dispatcher.manager.agents.commands import desired_state
from dispatcher.manager.auth.tokens import lifetime
from dispatcher.manager.rest import schemas, tokens
from dispatcher.manager.rest.long_poll import view_or_none
from dispatcher.manager.rest.routing import Answer, Json, Routes
from dispatcher.manager.rest.services import Services
from dispatcher.manager.rest.sessions import agents_of, listed, session_json
from dispatcher.manager.storage.auth import SessionRow, Visitor
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, Forbidden, NotFound

routes = Routes()


@routes.add("POST", "/sessions", {201: schemas.SignedIn})
def sign_in(
    services: Services,
    user: schemas.User,
    password: schemas.Password,
    address: schemas.Address,
    user_agent: Annotated[str, Field(max_length=4096)] = "",
    device: schemas.Token | None = None,
) -> Answer:
    """Sign in: starts or wakes the user's agent, makes a session."""
    apps = services.config.apps
    signed_in = services.signin.sign_in(
        user,
        password,
        Visitor(address=address, user_agent=_line(user_agent)),
        device,
        frozenset(name for name, app in apps.items() if app.credentials == "stdin"),
    )
    session = session_json(services, signed_in.session)
    return {"token": signed_in.token, "device": signed_in.device, "session": session}, 201


@routes.add("GET", "/signin", {200: schemas.SignInMethods})
def sign_in_methods(services: Services) -> Json:
    """List the ways to sign in: with a password, and at other sites."""
    entries = list(services.signin.authenticators)
    sites = [{"name": entry.name, "title": entry.title} for entry in entries if entry.title]
    return {"passwords": any(entry.verifies_passwords for entry in entries), "sites": sites}


@routes.add("POST", "/signin/begin", {201: schemas.SignInBegun})
def begin_sign_in(
    services: Services,
    authenticator: schemas.SiteName,
    nonce_sha256: schemas.Sha256,
    address: schemas.Address,
    next: Annotated[str, Field(max_length=4096)] = "/",
) -> Answer:
    """Begin a sign-in at another site, for the browser with this nonce."""
    return {"url": services.web_signin.begin(authenticator, nonce_sha256, address, next)}, 201


@routes.add("POST", "/signin/finish", {201: schemas.SignedInAtSite})
def finish_sign_in(
    services: Services,
    authenticator: schemas.SiteName,
    parameters: schemas.SiteAnswer,
    nonce: schemas.Token,
    address: schemas.Address,
    user_agent: Annotated[str, Field(max_length=4096)] = "",
    device: schemas.Token | None = None,
) -> Answer:
    """Finish it with the parameters with which the browser came back: starts the user's agent, makes a session."""
    visitor = Visitor(address=address, user_agent=_line(user_agent))
    signed_in, target = services.web_signin.finish(authenticator, parameters, nonce, visitor, device)
    session = session_json(services, signed_in.session)
    return {"token": signed_in.token, "device": signed_in.device, "session": session, "next": target}, 201


@routes.add("POST", "/signin/ended", {200: schemas.Revoked})
def ended_elsewhere(
    services: Services, authenticator: schemas.SiteName, token: schemas.LogoutToken, address: schemas.Address
) -> Json:
    """End the sessions that ended at another site, by its logout token."""
    count = services.web_signin.ended(authenticator, token, address)
    services.sync_edge()
    return {"revoked": count}


@routes.add("POST", "/sessions/sign-out", {200: schemas.SignedOut})
def sign_out(services: Services, sha256: schemas.Sha256) -> Json:
    """End a session; the answer has the URL at which the browser ends it at the other site, too, or null."""
    url = services.web_signin.sign_out(sha256)
    services.sync_edge()
    return {"url": url}


@routes.add("POST", "/sessions/lookup", {200: schemas.Session})
def lookup(services: Services, sha256: schemas.Sha256) -> Json:
    """Show a session; 404 when it has ended or is unknown."""
    return session_json(services, services.sessions.require(sha256))


@routes.add("POST", "/sessions/revoke", {204: None})
def revoke(services: Services, sha256: schemas.Sha256, id: schemas.SessionId | None = None) -> None:
    """End a session (logout), or another one of the same user."""
    if id is None:
        row = services.sessions.get(sha256)
        services.sessions.revoke(row.parent or row.sha256 if row else sha256)
    else:
        user = _user_session(services, sha256).user
        services.sessions.revoke(services.sessions.by_id(id, user).sha256)
    services.sync_edge()


@routes.add("POST", "/sessions/agents", {200: schemas.AgentList})
def my_agents(services: Services, sha256: schemas.Sha256) -> Json:
    """List the agents of a session's user; for a child session only its own agent."""
    row = services.sessions.require(sha256)
    return {"agents": [view.to_json() for view in agents_of(services, row)]}


@routes.add("POST", "/sessions/select", {200: schemas.Session})
def select(services: Services, sha256: schemas.Sha256, agent: schemas.Name) -> Json:
    """Send a session's requests to another agent of its user."""
    row = _user_session(services, sha256)
    chosen = _own_agent(services, row, agent).name
    session = services.sessions.select(row.sha256, chosen)
    services.sync_edge()  # the browser's next request must not overtake the change
    return session_json(services, session)


@routes.add("POST", "/sessions/state", {202: schemas.Agent})
def my_state(
    services: Services,
    sha256: schemas.Sha256,
    agent: schemas.Name,
    state: Literal["running", "stopped", "restart"],
) -> Answer:
    """Start, stop or restart an agent of a session's user."""
    row = services.sessions.require(sha256)
    agent = _own_agent(services, row, agent).name
    if state == "restart":
        services.supervisor.commands.restart(agent)
    else:
        services.supervisor.commands.set_desired(agent, desired_state(state))
    return services.supervisor.queries.view(agent).to_json(), 202


@routes.add("POST", "/sessions/list", {200: schemas.OwnAccess})
def my_sessions(services: Services, sha256: schemas.Sha256) -> Json:
    """List the sessions and API tokens of a session's user, and say what the password is for here."""
    user = _user_session(services, sha256).user
    return {
        **listed(services, services.sessions.all(user)),
        "changes_passwords": services.signin.changes_passwords(user),
        "tokens": tokens.listed(services.tokens.all(user)),
        "tokens_need_password": services.signin.has_password(user),
    }


@routes.add("POST", "/sessions/password", {200: schemas.Renewed})
def change_password(
    services: Services,
    sha256: schemas.Sha256,
    password: schemas.Password,
    address: schemas.Address,
    new_password: schemas.Password,
    revoke_tokens: bool = False,
) -> Json:
    """Change the password of a session's user: all other sessions end, this one is renewed."""
    user = _user_session(services, sha256).user
    services.signin.check(user, password, address)
    services.signin.set_password(user, new_password)
    token, row = services.sessions.renew(sha256)
    if revoke_tokens:
        services.tokens.revoke_user(user)
    services.sync_edge()
    return {"token": token, "session": session_json(services, row)}


@routes.add("POST", "/sessions/tokens", {201: schemas.CreatedToken})
def create_my_token(
    services: Services,
    sha256: schemas.Sha256,
    address: schemas.Address,
    password: schemas.Password | None = None,
    expires: schemas.Expires = DEFAULT_EXPIRY,
    note: schemas.Note = "",
) -> Answer:
    """Create an API token for the agents of a session's user, with the scope *app*.

    It outlasts the session, and a stolen session must not become a token: users who have a password must give it.
    """
    user = _user_session(services, sha256).user
    if services.signin.has_password(user):
        if password is None:
            raise BadRequest("The password is missing", why="a new token needs it", fix="enter your password")
        services.signin.check(user, password, address)
    token, row = services.tokens.create(user=user, scopes=["app"], seconds=lifetime(expires), note=note)
    if (
        services.sessions.get(sha256) is None
    ):  # ended meanwhile, as the user has left: with all tokens but this one
        services.tokens.revoke(row.sha256)
    services.sessions.require(sha256)
    services.sync_edge()
    return {"token": token, **tokens.token_json(row)}, 201


@routes.add("POST", "/sessions/tokens/revoke", {204: None})
def revoke_my_token(services: Services, sha256: schemas.Sha256, id: schemas.SessionId) -> None:
    """Revoke an API token of a session's user."""
    user = _user_session(services, sha256).user
    services.tokens.revoke(services.tokens.by_id(id, user).sha256)
    services.sync_edge()
    services.tokens.check_stored()


@routes.add("GET", "/identity/keys", {200: schemas.Keys})
def identity_keys(services: Services) -> Json:
    """Show the public keys of the statements that apps get about their users, as a JWK Set."""
    return services.identity.keys()


@routes.add("POST", "/sessions/handover", {201: schemas.Code})
def handover(
    services: Services, sha256: schemas.Sha256, host: schemas.Host, nonce_sha256: schemas.Sha256
) -> Answer:
    """Make a code that carries a sign-in to the host of one of the user's agents: once, within 30 seconds."""
    row = services.sessions.require(sha256)
    views = services.supervisor.queries.views(user=row.user)
    agent = next((view.name for view in views if view.label == host.partition(".")[0]), None)
    if agent is None or row.parent:
        raise Forbidden("That host does not belong to one of your agents", fix="open the app from the dashboard")
    now = services.clock.now()
    return {"code": services.handovers.issue(row.user, row.sha256, agent, host, nonce_sha256, now)}, 201


@routes.add("POST", "/sessions/redeem", {201: schemas.Renewed})
def redeem(services: Services, code: schemas.Token, nonce: schemas.Token, host: schemas.Host) -> Answer:
    """Turn a code into a session for its host, which ends with its parent."""
    found = services.handovers.redeem(code, nonce, host, services.clock.now())
    parent = services.sessions.get(found.parent)
    if parent is None:
        raise Forbidden("The sign-in has ended", fix="sign in again")
    token, row = services.sessions.child(parent, found.host, found.agent)
    return {"token": token, "session": session_json(services, row)}, 201


def _user_session(services: Services, sha256: str) -> SessionRow:
    """Return a session that may act for its user, not just for one agent.

    :raises NotFound: it has ended; :raises Forbidden: it is a child session.
    """
    row = services.sessions.require(sha256)
    if row.parent:
        raise Forbidden("This sign-in is valid for one app only", fix="go to your list of apps")
    return row


def _own_agent(services: Services, row: SessionRow, name: str) -> AgentView:
    """Return an agent that a session is for.

    :raises NotFound: any other agent, existing or not.
    """
    agent = names.agent_name(name)
    view = view_or_none(services, agent)
    if view is None or view.user_id != row.user_id or (row.parent and agent != row.agent):
        raise NotFound(f"There is no agent {agent}", fix="see the dashboard for your agents")
    return view


def _line(text: str) -> str:
    """Return a User-Agent field as one bounded, printable line."""
    return "".join(char if char.isprintable() else " " for char in text)[:256]
