"""The authenticator: finds a user's entry, signs in to the directory as that user, and asks for the groups.

Each sign-in has connections of its own, so there is nothing to repair after an outage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ldap3.utils.conv import escape_filter_chars
from ldap3.utils.dn import escape_rdn

from dispatcher.plugin import Authenticator, Deadline, DeadlineExceeded, Identity, Unavailable, Unsupported
from dispatcher_ldap.connection import Connection, Entry, NoEntry, Servers
from dispatcher_ldap.dn import first_values
from dispatcher_ldap.options import NAME, LdapOptions

MAX_DEPTH = 16  # groups within groups
MAX_GROUPS = 1000  # of one user
MAX_GROUP = 255  # characters
MEMBERS = ("member", "uniqueMember")
#: How directories mark an account that an administrator has disabled: OpenLDAP (draft-behera-ldap-password-policy,
#: 5.3.3; other times are of locks that end by themselves), 389 Directory Server and FreeIPA, eDirectory.
_DISABLED = {"pwdaccountlockedtime": b"000001010000z", "nsaccountlock": b"true", "logindisabled": b"true"}
_CONTROL, _ACCOUNT_DISABLED = "useraccountcontrol", 2  # Active Directory: bits


class LdapAuthenticator(Authenticator):
    """Verifies passwords by signing in to the directory."""

    name = "ldap"
    api_version = 1
    Options = LdapOptions
    options: LdapOptions
    changes_passwords = False

    def __init__(self, *, options: LdapOptions) -> None:
        super().__init__(options=options)
        self._servers = Servers(options)

    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        """See `Authenticator`."""
        if deadline.expired:
            raise DeadlineExceeded("The directory was not asked in time")
        try:
            secret = password.encode()
            name.encode()
        except UnicodeEncodeError:
            return None
        # A server takes an empty password for an anonymous sign-in, which succeeds (RFC 4513, 5.1.2).
        # It ignores blanks and control characters in names (RFC 4518, 2.2 and 2.6), so that they stand for others.
        if not secret or not name or not name.isprintable() or " " in name:
            return None
        return self._servers.ask(lambda connection: self._identity(connection, name, secret), deadline)

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        """See `Authenticator`."""
        raise Unsupported(
            "Passwords are not changed here", fix="change it where your organisation's passwords are"
        )

    def check(self, *, deadline: Deadline) -> None:
        """Ask each server as a sign-in would.

        :raises Unavailable: one of them cannot be used.
        """
        problems = []
        for server in self.options.servers:
            try:
                self._servers.ask(self._check_server, deadline, [server])
            except Unavailable as error:
                problems.append(error)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise Unavailable(
                problems[0].what, why="; ".join(error.why or error.what for error in problems), fix=problems[0].fix
            )

    def lookup(self, name: str, *, deadline: Deadline) -> Identity | None:
        """See `Authenticator`."""
        if self.options.user_dn is not None and self.options.bind_dn is None:
            raise Unsupported("Users read their own entries only", fix="set auth.ldap.bind_dn")
        if not name.isprintable() or " " in name:
            return None
        return self._servers.ask(lambda connection: self._known(connection, name), deadline)

    def _known(self, connection: Connection, name: str) -> Identity | None:
        self._bind_for_searches(connection)
        if self.options.user_dn is None:
            entry = self._find(connection, name)
        else:
            dn = self.options.user_dn.replace(NAME, escape_rdn(name))
            try:
                found = connection.search(dn, "(objectClass=*)", self._attributes(), entry_alone=True)
            except NoEntry:
                found = []
            entry = found[0] if found else None
        return self._identity_of(connection, *entry) if entry else None

    def _check_server(self, connection: Connection) -> None:
        self._bind_for_searches(connection)
        for key in ("user_base", "group_base"):
            base = getattr(self.options, key)
            if base is not None and not _exists(connection, base):
                raise Unavailable(
                    f"{connection.server} has no entry {base}, or does not show it",
                    fix=f"correct auth.ldap.{key}, or let auth.ldap.bind_dn read it",
                )

    # -- a user ------------------------------------------------------------------------------------------

    def _identity(self, connection: Connection, name: str, password: bytes) -> Identity | None:
        options = self.options
        if options.user_dn is not None:
            entry: Entry | None = (options.user_dn.replace(NAME, escape_rdn(name)), {})
        else:
            self._bind_for_searches(connection)
            entry = self._find(connection, name)
        # Sign in for an unknown name, too: otherwise the time shows which users exist.
        nobody = f"{options.user_attribute.split(';')[0]}={escape_rdn(name)},{options.user_base}"
        if not connection.bind(entry[0] if entry else nobody, password) or entry is None:
            return None
        dn, values = entry
        if options.user_dn is not None:
            values = self._own_entry(connection, dn)
            if not values:
                values = {options.user_attribute.lower(): [name.encode()]}
        if options.group_base is not None and options.bind_dn is not None:
            self._bind_for_searches(connection)
        return self._identity_of(connection, dn, values)

    def _identity_of(
        self, connection: Connection, dn: str, values: Mapping[str, Sequence[bytes]]
    ) -> Identity | None:
        """Return the user of an entry, None if the account is disabled or the user is in no allowed group."""
        options = self.options
        if _is_disabled(values):
            return None
        user = self._spelling(dn, values)
        if user is None:
            raise Unavailable(
                f"The entry {dn} has no attribute {options.user_attribute}, or does not show it",
                fix="correct auth.ldap.user_attribute, or let auth.ldap.bind_dn read it",
            )
        groups = self._groups(connection, dn, user) if options.group_base is not None else frozenset()
        if options.allow_groups:
            allowed = {group.casefold() for group in options.allow_groups}
            if not any(name.casefold() in allowed for name in groups):
                return None
        ids = values.get(options.user_id_attribute.lower(), ()) if options.user_id_attribute else ()
        if options.user_id_attribute and not ids and "user_id_attribute" in options.model_fields_set:
            # Without it, a later account of the same name could not be told from this one.
            raise Unavailable(
                f"The entry {dn} has no attribute {options.user_id_attribute}, or does not show it",
                fix="correct auth.ldap.user_id_attribute, or let auth.ldap.bind_dn read it",
            )
        return Identity(user=user, groups=groups, subject=_shown(ids[0]) if ids else None)

    def _attributes(self) -> list[str]:
        named = [name for name in (self.options.user_attribute, self.options.user_id_attribute) if name]
        return [*named, *_DISABLED, _CONTROL]

    def _bind_for_searches(self, connection: Connection) -> None:
        options = self.options
        if options.bind_dn is None:
            return
        assert options.bind_password_file is not None
        try:
            password = options.bind_password_file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise Unavailable(
                f"{options.bind_password_file} cannot be read",
                why=error.strerror or str(error),
                fix="make it readable by the manager's user, or correct auth.ldap.bind_password_file",
            ) from error
        if not password or not connection.bind(options.bind_dn, password):
            raise Unavailable(
                f"{connection.server} refuses {options.bind_dn}",
                why="the password in auth.ldap.bind_password_file is empty"
                if not password
                else "wrong name or password",
                fix="correct auth.ldap.bind_dn and the password in auth.ldap.bind_password_file",
            )

    def _find(self, connection: Connection, name: str) -> Entry | None:
        options = self.options
        assert options.user_base is not None
        wanted = options.user_filter.replace(NAME, escape_filter_chars(name))
        try:
            found = connection.search(options.user_base, wanted, self._attributes(), limit=2)
        except NoEntry as error:
            raise Unavailable(
                f"{connection.server} has no entry {options.user_base}", fix="correct auth.ldap.user_base"
            ) from error
        if len(found) > 1:
            raise Unavailable(
                f"auth.ldap.user_filter finds several entries, among them {found[0][0]} and {found[1][0]}",
                fix="make the filter narrower, so that a name has one entry",
            )
        return found[0] if found else None

    def _own_entry(self, connection: Connection, dn: str) -> dict[str, Sequence[bytes]]:
        """Return what users may read of their own entry, perhaps nothing."""
        try:
            found = connection.search(dn, "(objectClass=*)", self._attributes(), entry_alone=True)
        except NoEntry:
            return {}
        return dict(found[0][1]) if found else {}

    def _spelling(self, dn: str, values: object) -> str | None:
        """Return the user's name: of several, the one in the name of the entry, else the first by letters."""
        attribute = self.options.user_attribute.lower()
        assert isinstance(values, dict)
        found = sorted(value.decode("utf-8", "replace") for value in values.get(attribute, ()))
        own = {value.lower() for value in first_values(dn, attribute)}
        return next((value for value in found if value.lower() in own), found[0] if found else None)

    # -- groups ------------------------------------------------------------------------------------------

    def _groups(self, connection: Connection, dn: str, user: str) -> frozenset[str]:
        """Return the names of the groups of a user, of the groups with these groups, and so on."""
        seen: set[str] = set()
        found_names: set[str] = set()
        members, account = [dn], user
        for _ in range(MAX_DEPTH if self.options.nested_groups else 1):
            found = [each for member in members for each in self._groups_of(connection, member, account)]
            known = (name for _, names in found for name in names)
            found_names.update(name for name in known if name.isprintable() and len(name) <= MAX_GROUP)
            members = [group for group in dict(found) if group not in seen]
            seen.update(members)
            account = ""
            if len(found_names) > MAX_GROUPS:
                raise Unavailable(
                    f"{user} is a member of more than {MAX_GROUPS} groups",
                    fix="make auth.ldap.group_base narrower",
                )
            if not members:
                break
        return frozenset(found_names)

    def _groups_of(self, connection: Connection, member: str, account: str) -> list[tuple[str, list[str]]]:
        """Return entry and names of each group with this member.

        :param account: the user's name, for groups that list names (RFC 2307); "" for a group.
        """
        options = self.options
        assert options.group_base is not None
        dn = escape_filter_chars(member)
        parts = [f"({attribute}={dn})" for attribute in MEMBERS]
        if account:
            parts.append(f"(memberUid={escape_filter_chars(account)})")
        try:
            found = connection.search(options.group_base, f"(|{''.join(parts)})", [options.group_attribute])
        except NoEntry as error:
            raise Unavailable(
                f"{connection.server} has no entry {options.group_base}, or does not show it",
                fix="correct auth.ldap.group_base, or let auth.ldap.bind_dn read it",
            ) from error
        attribute = options.group_attribute.lower()
        return [
            (dn, [value.decode("utf-8", "replace") for value in values.get(attribute, ())]) for dn, values in found
        ]


def _shown(value: bytes) -> str:
    """Return a value as text; a binary one in hexadecimal."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() else value.hex()


def _is_disabled(values: Mapping[str, Sequence[bytes]]) -> bool:
    """Whether an entry says that its account is disabled: in a lookup there is no password to refuse."""
    if any(text in [each.lower() for each in values.get(name, ())] for name, text in _DISABLED.items()):
        return True
    return any(each.isdigit() and int(each) & _ACCOUNT_DISABLED for each in values.get(_CONTROL, ()))


def _exists(connection: Connection, base: str) -> bool:
    try:
        return bool(connection.search(base, "(objectClass=*)", ["1.1"], entry_alone=True))
    except NoEntry:
        return False
