"""Role *admin*: sessions, providers, statistics, the manager itself."""

from __future__ import annotations

from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.routing import Answer, Routes
from dispatcher.manager.rest.services import Json, Services
from dispatcher.plugin import names

routes = Routes()


@routes.add("GET", "/sessions", query=schemas.ListSessions, answers={200: "SessionList"})
def list_sessions(services: Services, query: schemas.ListSessions) -> Json:
    """List sessions, all or one user's."""
    user = names.user_name(query.user) if query.user is not None else None
    return {"sessions": services.listed(services.sessions.all(user))}


@routes.add("DELETE", "/sessions", query=schemas.RevokeSessions, answers={200: "Revoked"})
def revoke_sessions(services: Services, query: schemas.RevokeSessions) -> Json:
    """End all sessions of a user."""
    revoked = services.sessions.revoke_user(names.user_name(query.user))
    services.settle()
    return {"revoked": revoked}


@routes.add("DELETE", "/sessions/<id>", answers={204: ""})
def revoke_session(services: Services, id: str) -> Answer:
    """End one session."""
    services.sessions.revoke(services.sessions.by_id(id).sha256)
    services.settle()
    return Answer(204)


@routes.add("GET", "/providers", answers={200: "ProviderList"})
def providers(services: Services) -> Json:
    """List the providers and whether they can be used."""
    return {"providers": services.supervisor.providers()}


@routes.add("GET", "/providers/<provider>/check", query=schemas.CheckProvider, answers={200: "Findings"})
def check_provider(services: Services, provider: str, query: schemas.CheckProvider) -> Json:
    """Say what a provider isolates and what it does not, for one app or as a whole."""
    found = services.supervisor.check_provider(provider, query.app)
    return {"findings": [{"level": item.level.value, "what": item.what, "fix": item.fix} for item in found]}


@routes.add("GET", "/stats/memory_usage", answers={200: "MemoryUsage"})
def memory_usage(services: Services) -> Json:
    """Show how much memory the agents use."""
    return services.supervisor.memory_usage()


@routes.add("GET", "/stats/top", answers={200: "Top"})
def top(services: Services) -> Json:
    """Show what each agent uses."""
    return {"agents": services.supervisor.top()}


@routes.add("POST", "/reload", answers={200: "Reloaded"})
def reload(services: Services) -> Json:
    """Read the configuration again; nothing changes when it is wrong."""
    return {"changed": services.reload()}
