"""The built-in authenticator `local`: argon2id hashes in the manager's database.

It is registered like a plugin's (`Plugins.register`), but needs the manager's database; so the class is made
for one manager.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from dispatcher.manager.auth.hashing import Hasher, check_length
from dispatcher.manager.storage.agents import LOCAL, Store
from dispatcher.plugin.authenticator import Authenticator, Identity
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.hooks import hookimpl

NAME = LOCAL


class LocalOptions(BaseModel):
    """``[auth.local]`` has no keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def plugin(store: Store, hasher: Hasher) -> object:
    """Return a plugin object whose authenticator verifies passwords against this store."""

    class LocalAuthenticator(Authenticator):
        name = NAME
        Options = LocalOptions

        def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
            user = store.get_user(name)
            stored = user.password_hash if user else None
            if not hasher.verify(stored, password) or stored is None:
                return None
            if hasher.outdated(stored):
                store.set_password_hash(name, hasher.hash(password))
            return Identity(user=name)

        def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
            check_length(password)
            store.set_password_hash(name, hasher.hash(password))

    class Plugin:
        @hookimpl
        def dispatcher_register_authenticators(self) -> Iterable[type[Authenticator]]:
            return [LocalAuthenticator]

    return Plugin()
