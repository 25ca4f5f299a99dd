"""Role *admin*: what directories know of users."""

from __future__ import annotations

from dispatcher.config import groups
from dispatcher.manager.auth.authenticators import is_same_account, source_of
from dispatcher.manager.auth.directory_sync import Report
from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.routing import Answer, Json, Routes
from dispatcher.manager.rest.services import Services
from dispatcher.plugin import names
from dispatcher.plugin.authenticator import Identity
from dispatcher.plugin.errors import Conflict, NotFound

routes = Routes()


@routes.add("POST", "/sync", {202: schemas.Sync})
def begin_sync(services: Services, force: bool = False, dry_run: bool = False) -> Answer:
    """Begin to read the groups of users from their directories, and to find users who have left."""
    return _report(services.sync.begin(force=force, dry_run=dry_run)), 202


@routes.add("GET", "/sync", {200: schemas.Sync})
def show_sync(services: Services) -> Json:
    """Show the last synchronisation, or the one in progress."""
    if services.sync.report is None:
        raise NotFound("There was no synchronisation since the manager started", fix="POST /sync begins one")
    return _report(services.sync.report)


def _report(report: Report) -> Json:
    return {
        "running": report.running,
        "dry_run": report.dry_run,
        "users": report.users,
        "asked": report.asked,
        "changed": sorted(report.changed),
        "left": sorted(report.left),
        "back": sorted(report.back),
        "removed": sorted(report.removed),
        "skipped": dict(report.skipped),
        "problems": list(report.problems),
    }


@routes.add("POST", "/sign-in/test", {200: schemas.SignInTest})
def try_sign_in(
    services: Services,
    name: schemas.User,
    password: schemas.Password | None = None,
    authenticator: schemas.Name | None = None,
) -> Json:
    """Show the result of a sign-in, with the password or without; nothing is stored."""
    found = services.signin.preview(name, password, authenticator)
    if found is None:
        return {"accepted": False, "refusal": "wrong name or password, or the user may not sign in"}
    source, identity = found
    return {"accepted": True, "authenticator": source, **_effect(services, source, identity)}


def _effect(services: Services, source: str, identity: Identity) -> Json:
    config, user = services.config, identity.user
    row = services.supervisor.store.get_user(user)
    owner = source_of(row)
    refusal = ""
    if row and owner not in {None, source}:
        refusal = f"the name belongs to a user of {owner} (dispatcher auth release {user})"
    elif row and not is_same_account(row, identity):
        refusal = f"the name belongs to another account of the directory (dispatcher auth release {user})"
    member_of = groups.groups_of(config.groups, user, identity.groups)
    apps = [app for app in config.apps if groups.may_use(config.groups, app, member_of)]
    if not apps:
        refusal = refusal or "the user may use no app"
    return {
        "accepted": not refusal,
        "refusal": refusal,
        "user": user,
        "groups": sorted(identity.groups),
        "configured_groups": sorted(member_of - identity.groups),
        "apps": apps,
        "agents": [view.name for view in services.supervisor.queries.views(user=user)],
    }


@routes.add("POST", "/users/<user>/release", {204: None})
def release(services: Services, user: str) -> None:
    """Release a name: the next account of a directory that signs in with it gets the agents."""
    user = names.user_name(user)
    if not services.signin.authenticators.external:
        raise Conflict(
            f"The name {user} cannot be released",
            why="there is no other authenticator than local, so nobody could sign in with it",
            fix="change the password with `dispatcher passwd`",
        )
    services.supervisor.store.release_user(user)
    services.supervisor.access.set_groups(user, ())
    services.sessions.revoke_user(user)
    services.tokens.revoke_user(user)
    services.sync_edge()
