"""The table ``[auth.oidc.NAME]``."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from dispatcher.plugin import AbsolutePath, Duration, Flag, Table

#: Parameters of the authorization request that the authenticator sets itself.
_OWN_PARAMETERS = frozenset({
    "client_id", "client_secret", "code_challenge", "code_challenge_method", "nonce", "redirect_uri", "request",
    "request_uri", "response_mode", "response_type", "scope", "state",
})  # fmt: skip


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine, so that nobody listens on the way."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def is_safe(url: str) -> bool:
    """Whether a URL may be used: https, or http to this machine, without credentials or a fragment."""
    try:
        parts = urlsplit(url)
        good = parts.port is None or parts.port > 0
    except ValueError:
        return False
    plain = good and url.isascii() and url.isprintable() and " " not in url and not parts.fragment
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))
    return plain and safe and bool(parts.hostname) and parts.username is None


def _issuer(value: str) -> str:
    if not is_safe(value) or urlsplit(value).query or len(value) > 1024:
        raise ValueError("a URL such as https://login.example.org/realms/staff; http only for this machine")
    return value


def _token(value: str) -> str:
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("printable ASCII without blanks")
    return value


def _domain(value: str) -> str:
    if not value or "@" in value or " " in value:
        raise ValueError("a domain such as example.org, without @")
    return value.lower()


def _parameters(value: dict[str, str]) -> dict[str, str]:
    for name in _OWN_PARAMETERS & value.keys():
        raise ValueError(f"parameters without {name}, which is set for each sign-in")
    return value


Issuer = Annotated[str, AfterValidator(_issuer)]
Token = Annotated[str, AfterValidator(_token)]
Domain = Annotated[str, AfterValidator(_domain)]
Parameters = Annotated[dict[str, str], AfterValidator(_parameters)]


class OidcOptions(Table):
    """``[auth.oidc.NAME]``."""

    issuer: Issuer = Field(
        description="the provider's issuer, exactly as in its ISSUER/.well-known/openid-configuration"
    )
    title: str = Field(
        default="",
        max_length=64,
        description='name on the button "Sign in with TITLE"; by default the issuer\'s host',
    )
    client_id: Token = Field(description="client ID of dispatcher at the provider")
    client_secret_file: AbsolutePath | None = Field(
        default=None,
        description="file with the secret of client_id, which only the manager's user may read; "
        "none for a public client",
    )
    client_auth: Literal["auto", "basic", "post"] = Field(
        default="auto",
        description="how the secret is sent: basic (header), post (body), or auto (as the provider supports it)",
    )
    scopes: list[Token] = Field(
        default=["profile", "email"], description="scopes to request in addition to openid, for the claims"
    )
    username_claim: str = Field(
        default="preferred_username",
        min_length=1,
        description="claim that becomes the name of the user; email counts only if email_verified is true",
    )
    strip_domain: Domain | None = Field(
        default=None,
        description="domain to remove from names: with example.org, alice@example.org becomes alice; "
        "names of other domains are not changed",
    )
    groups_claim: str | None = Field(
        default=None,
        min_length=1,
        description="claim with the user's groups; realm_access.roles: roles in the object realm_access",
    )
    allow_groups: list[str] = Field(
        default=[],
        description="only members of one of these groups may sign in; by default, all users of the provider",
    )
    require: dict[str, Flag | str] = Field(
        default={}, description='claims that a user must have, with their values, such as {hd = "example.org"}'
    )
    parameters: Parameters = Field(
        default={}, description='further parameters of the sign-in, such as {prompt = "select_account"}'
    )
    sign_out: Flag = Field(
        default=True,
        description="signing out here ends the session at the provider, too, if the provider can do this",
    )
    ca_file: AbsolutePath | None = Field(
        default=None,
        description="CA certificates for the provider's certificate; by default the system's",
    )
    timeout: Duration = Field(default=5.0, ge=0.1, description="maximum wait for one answer of the provider")
    clock_skew: Duration = Field(
        default=60.0, le=600, description="tolerated difference between the provider's clock and this machine's"
    )

    @property
    def shown(self) -> str:
        """The name of the provider for people."""
        return self.title.strip() or urlsplit(self.issuer).netloc

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allow_groups and self.groups_claim is None:
            raise ValueError("allow_groups needs groups_claim")
        return self
