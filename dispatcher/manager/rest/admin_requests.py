"""Role *admin*: sessions, providers, statistics, the manager itself."""

from __future__ import annotations

from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.plugin_states import plugin_states
from dispatcher.manager.rest.routing import Json, Routes
from dispatcher.manager.rest.services import Services
from dispatcher.manager.rest.sessions import listed
from dispatcher.plugin import names
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, NotFound
from dispatcher.plugin.model import Finding

CHECK_SECONDS = 20.0
routes = Routes()


@routes.add("GET", "/sessions", {200: schemas.SessionList})
def list_sessions(services: Services, user: schemas.Name | None = None) -> Json:
    """List sessions, all or one user's."""
    return listed(services, services.sessions.all(names.user_name(user) if user is not None else None))


@routes.add("DELETE", "/sessions", {200: schemas.Revoked})
def revoke_sessions(services: Services, user: schemas.Name) -> Json:
    """End all sessions of a user, never of all users."""
    user = names.user_name(user)
    revoked = services.sessions.revoke_user(user)
    if not revoked and services.supervisor.store.get_user(user) is None:
        raise NotFound(f"There is no user {user}", fix="see: dispatcher list")
    services.sync_edge()
    return {"revoked": revoked}


@routes.add("DELETE", "/sessions/<id>", {204: None})
def revoke_session(services: Services, id: str) -> None:
    """End one session."""
    services.sessions.revoke(services.sessions.by_id(id).sha256)
    services.sync_edge()


@routes.add("GET", "/providers", {200: schemas.ProviderList})
def providers(services: Services) -> Json:
    """List the providers and whether they can be used."""
    return {"providers": services.supervisor.queries.providers()}


@routes.add("GET", "/plugins", {200: schemas.PluginList})
def plugins(services: Services) -> Json:
    """List the installed plugins: providers, authenticators, observers."""
    return {"plugins": [state.to_json() for state in plugin_states(services)]}


@routes.add("GET", "/providers/<provider>/check", {200: schemas.Findings})
def check_provider(services: Services, provider: str, app: schemas.App | None = None) -> Json:
    """Describe what a provider isolates and what it does not, for one app or in general."""
    found = services.supervisor.queries.check_provider(provider, app)
    return {"findings": [{"level": item.level.value, "what": item.what, "fix": item.fix} for item in found]}


@routes.add("GET", "/authenticator/check", {200: schemas.Findings})
def check_authenticator(services: Services, plugin: schemas.App | None = None) -> Json:
    """Verify that users can sign in, with all authenticators or those of one plugin."""
    found = []
    for entry in services.signin.authenticators:
        owner, _, own = entry.name.partition(".")
        if plugin not in {None, owner}:
            continue
        name = "" if plugin == entry.name else f"{own}: " if plugin else f"{entry.name}: "
        try:
            entry.check(deadline=Deadline(CHECK_SECONDS))
            told = f"; its redirect URI is {services.web_signin.callback(entry.name)}" if entry.title else ""
            finding = Finding.ok(f"{name}can be used (authenticator){told}")
        except DispatcherError as error:
            what = f"{error.what}: {error.why}" if error.why else error.what
            finding = Finding.error(f"{name}{what}", error.fix or "")
        found.append({"level": finding.level.value, "what": finding.what, "fix": finding.fix})
    return {"findings": found}


@routes.add("GET", "/stats/memory_usage", {200: schemas.MemoryUsage})
def memory_usage(services: Services) -> Json:
    """Show how much memory the agents use."""
    return services.supervisor.queries.memory_usage()


@routes.add("GET", "/stats/top", {200: schemas.Top})
def top(services: Services) -> Json:
    """Show what each agent uses."""
    return {"agents": services.supervisor.queries.top()}


@routes.add("POST", "/reload", {200: schemas.Reloaded})
def reload(services: Services) -> Json:
    """Read the configuration again; nothing changes when it is wrong."""
    changed, faults = services.reload()
    return {"changed": changed, "faults": faults}
