"""The table ``[auth.ldap]``."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from dispatcher.plugin import AbsolutePath, Duration, Flag, Table
from dispatcher_ldap.dn import is_dn

NAME = "{name}"


def _server(value: str) -> str:
    try:
        parts = urlsplit(value)
        whole = parts.path in {"", "/"} and not (parts.query or parts.fragment or parts.username)
        good = whole and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.scheme not in {"ldap", "ldaps"} or not value.isascii() or " " in value:
        raise ValueError("a URL such as ldaps://ldap.example.org or ldap://ldap.example.org:389")
    return value.rstrip("/")


def _dn(value: str) -> str:
    if not is_dn(value):
        raise ValueError("a distinguished name such as ou=people,dc=example,dc=org")
    return value


def _filter(value: str) -> str:
    from ldap3.core.exceptions import LDAPInvalidFilterError
    from ldap3.operation.search import parse_filter

    try:
        parse_filter(value.replace(NAME, "name"), None, False, False, None, False)
        good = NAME in value
    except LDAPInvalidFilterError:
        good = False
    if not good:
        raise ValueError("a filter in brackets with {name}, such as (uid={name})")
    return value


def _pattern(value: str) -> str:
    if NAME not in value or not is_dn(value.replace(NAME, "name")):
        raise ValueError("a distinguished name with {name}, such as uid={name},ou=people,dc=example,dc=org")
    return value


Server = Annotated[str, AfterValidator(_server)]
Dn = Annotated[str, AfterValidator(_dn)]
UserFilter = Annotated[str, AfterValidator(_filter)]
DnPattern = Annotated[str, AfterValidator(_pattern)]


class LdapOptions(Table):
    """``[auth.ldap]``."""

    servers: list[Server] = Field(
        min_length=1,
        description="URLs of the servers, tried in this order; ldap:// is encrypted by StartTLS",
    )
    start_tls: Flag = Field(
        default=True, description="encrypt connections to ldap:// servers; false sends passwords in plain text"
    )
    ca_file: AbsolutePath | None = Field(
        default=None,
        description="certificates of the authorities that sign the servers' certificates; by default the system's",
    )
    timeout: Duration = Field(
        default=5.0, ge=0.1, description="maximum wait for one server, before the next one is tried"
    )
    bind_dn: Dn | None = Field(
        default=None, description="account that searches for users and groups; by default, searches are anonymous"
    )
    bind_password_file: AbsolutePath | None = Field(
        default=None, description="file with the password of bind_dn, which only the manager's user may read"
    )
    user_dn: DnPattern | None = Field(
        default=None, description="name of a user's entry, with {name}; instead of user_base, without a search"
    )
    user_base: Dn | None = Field(default=None, description="entry below which users are searched")
    user_filter: UserFilter = Field(
        default="(uid={name})",
        description="finds a user's entry; Active Directory: (&(objectClass=user)(sAMAccountName={name}))",
    )
    user_attribute: str = Field(
        default="uid",
        pattern=r"^[A-Za-z][A-Za-z0-9;-]*$",
        description="attribute that becomes the name of the user; Active Directory: sAMAccountName",
    )
    user_id_attribute: str | None = Field(
        default="entryUUID",
        pattern=r"^[A-Za-z][A-Za-z0-9;-]*$",
        description="attribute that tells an account from a later one of the same name, if the directory has it; "
        "Active Directory: objectGUID",
    )
    allow_groups: list[str] = Field(
        default=[],
        description="only members of one of these groups may sign in; by default, all users that are found",
    )
    group_base: Dn | None = Field(
        default=None, description="entry below which groups are searched; by default users have no groups"
    )
    group_attribute: str = Field(
        default="cn", pattern=r"^[A-Za-z][A-Za-z0-9;-]*$", description="attribute with the name of a group"
    )
    nested_groups: Flag = Field(
        default=False, description="members of a group are members of the groups that contain it, too"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.user_dn is None) == (self.user_base is None):
            raise ValueError("exactly one of user_dn and user_base must be set")
        if (self.bind_dn is None) != (self.bind_password_file is None):
            raise ValueError("bind_dn and bind_password_file must be set together")
        if self.allow_groups and self.group_base is None:
            raise ValueError("allow_groups needs group_base")
        return self
