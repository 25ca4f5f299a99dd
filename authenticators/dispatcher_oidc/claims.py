"""From claims to a user: name, groups, and whether the options let the user in.  Pure."""

from __future__ import annotations

from typing import Any

from dispatcher_oidc.http import Json
from dispatcher_oidc.options import OidcOptions

MAX_GROUPS = 1000
MAX_GROUP = 255  # characters


class Refused(Exception):
    """The user may not sign in; the text says why, for operators."""


def find(claims: Json, path: str) -> Any:
    """Return a claim by its name, else by a path such as ``realm_access.roles``; None if it is missing."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def wanted(options: OidcOptions) -> list[str]:
    """Return the claims that the options need."""
    return [options.username_claim, *([options.groups_claim] if options.groups_claim else []), *options.require]


def user(claims: Json, options: OidcOptions) -> str:
    """Return the name of the user.

    :raises Refused: there is none.
    """
    claim = options.username_claim
    value = find(claims, claim)
    if not isinstance(value, str) or not value:
        raise Refused(f"the claim {claim} is missing (username_claim)")
    verified = claims.get("email_verified")
    if claim == "email" and verified is not True and verified != "true":  # a text from Amazon Cognito
        raise Refused("the email address is not verified")
    name, at, domain = value.rpartition("@")
    return name if at and name and options.strip_domain == domain.lower() else value


def groups(claims: Json, options: OidcOptions) -> frozenset[str]:
    """Return the user's groups.

    :raises Refused: they are too many, or none of them is allowed.
    """
    if options.groups_claim is None:
        return frozenset()
    value = find(claims, options.groups_claim)
    if value is None and _is_left_out(claims, options.groups_claim):
        raise Refused(
            f"the user has more groups than the provider sends in {options.groups_claim} (_claim_names): "
            "let it send those that are assigned to this client only, or roles"
        )
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    found = frozenset(
        each for each in values if isinstance(each, str) and each.isprintable() and 0 < len(each) <= MAX_GROUP
    )
    if len(found) > MAX_GROUPS:
        raise Refused(
            f"the user has more than {MAX_GROUPS} groups: let the provider send those of this client only"
        )
    if options.allow_groups and found.isdisjoint(options.allow_groups):
        missing = "" if value is not None else f": the claim {options.groups_claim} is missing (groups_claim)"
        raise Refused(f"the user is in none of allow_groups{missing}")
    return found


def _is_left_out(claims: Json, name: str) -> bool:
    """Whether the user has a claim that is elsewhere (OpenID Connect Core 1.0, section 5.6.2).

    Entra ID does this with groups if they are too many; the place needs another token than the provider gives out.
    """
    elsewhere = claims.get("_claim_names")
    return (isinstance(elsewhere, dict) and name in elsewhere) or (
        name == "groups" and claims.get("hasgroups") in (True, "true")
    )


def check_required(claims: Json, options: OidcOptions) -> None:
    """Check the claims of the option `require`.

    :raises Refused: one of them is missing or has another value.
    """
    for name, value in options.require.items():
        found = find(claims, name)
        values = found if isinstance(found, list) else [found]
        if not any(type(each) is type(value) and each == value for each in values):
            raise Refused(f"the claim {name} is not {value!r} (require)")
