"""The built-in authenticator `local`: argon2id hashes in the manager's database.

It is registered like a plugin's (`Plugins.register`), but needs the manager's database; so the class is made
for one manager.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from dispatcher.manager.auth.passwords import Hasher, check_length
from dispatcher.manager.storage.rows import UserRow
from dispatcher.plugin.authenticator import Authenticator, Identity
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.hooks import hookimpl

NAME = "local"


class Users(Protocol):
    """The methods of the store that are needed."""

    def get_user(self, name: str) -> UserRow | None:
        """Return a user by canonical name."""

    def set_password_hash(self, name: str, password_hash: str) -> None:
        """Replace a user's hash."""


class LocalOptions(BaseModel):
    """``[auth.local]`` has no keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LocalAuthenticator(Authenticator):
    """Verifies passwords against the store.  Subclassed by `plugin` with `users` and `hasher` set."""

    name = NAME
    Options = LocalOptions
    users: Users
    hasher: Hasher

    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        user = self.users.get_user(name)
        stored = user.password_hash if user else None
        if not self.hasher.verify(stored, password) or stored is None:
            return None
        if self.hasher.outdated(stored):
            self.users.set_password_hash(name, self.hasher.hash(password))
        return Identity(user=name)

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        check_length(password)
        self.users.set_password_hash(name, self.hasher.hash(password))


def plugin(users: Users, hasher: Hasher) -> object:
    """Return a plugin object whose authenticator works on these users."""
    bound = type("LocalAuthenticator", (LocalAuthenticator,), {"users": users, "hasher": hasher})

    class Plugin:
        @hookimpl
        def dispatcher_register_authenticators(self) -> Iterable[type[Authenticator]]:
            return [bound]

    return Plugin()
