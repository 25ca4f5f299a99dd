"""Role *admin*: `/tokens`; and tokens as the two roles see them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from dispatcher.common.api_tokens import DEFAULT_EXPIRY, SCOPES
from dispatcher.manager.agents.agent import iso
from dispatcher.manager.auth.tokens import lifetime, public_id
from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.routing import Answer, Json, Routes
from dispatcher.manager.rest.services import Services
from dispatcher.manager.storage.tokens import TokenRow
from dispatcher.plugin import names
from dispatcher.plugin.errors import NotFound

routes = Routes()


@routes.add("GET", "/tokens", {200: schemas.TokenList})
def list_tokens(services: Services, user: schemas.Name | None = None) -> Json:
    """List API tokens, all or one user's."""
    return {"tokens": listed(services.tokens.all(names.user_name(user) if user is not None else None))}


@routes.add("POST", "/tokens", {201: schemas.CreatedToken})
def create_token(
    services: Services,
    user: schemas.Name | None = None,
    service: schemas.Name | None = None,
    scopes: Annotated[list[schemas.Scope], Field(max_length=len(SCOPES))] = [],  # noqa: B006 - is not changed
    expires: schemas.Expires = DEFAULT_EXPIRY,
    note: schemas.Note = "",
) -> Answer:
    """Create an API token of a user or a service; the answer alone holds it."""
    token, row = services.tokens.create(
        user=None if user is None else names.user_name(user),
        service=None if service is None else names.user_name(service),
        scopes=scopes,
        seconds=lifetime(expires),
        note=note,
    )
    services.sync_edge()
    return {"token": token, **token_json(row)}, 201


@routes.add("DELETE", "/tokens", {200: schemas.Revoked})
def revoke_tokens(services: Services, user: schemas.Name) -> Json:
    """Revoke all API tokens of a user, never of all users."""
    user = names.user_name(user)
    revoked = services.tokens.revoke_user(user)
    if not revoked and services.supervisor.store.get_user(user) is None:
        raise NotFound(f"There is no user {user}", fix="see: dispatcher list")
    services.sync_edge()
    services.tokens.check_stored()
    return {"revoked": revoked}


@routes.add("DELETE", "/tokens/<id>", {204: None})
def revoke_token(services: Services, id: str) -> None:
    """Revoke one API token."""
    services.tokens.revoke(services.tokens.by_id(id).sha256)
    services.sync_edge()
    services.tokens.check_stored()


def token_json(row: TokenRow) -> Json:
    """Return TOKEN: all that is known of a token but itself."""
    return {
        "id": public_id(row),
        "user": row.user,
        "service": row.service,
        "scopes": list(row.scopes),
        "note": row.note,
        "created": iso(row.created),
        "expires": iso(row.expires),
        "last_used": iso(row.last_used),
    }


def listed(rows: Iterable[TokenRow]) -> list[Json]:
    """Return tokens."""
    return [token_json(row) for row in rows]
