"""The authenticator contract, version 1.  Pure declaration: plugins subclass `Authenticator`.

An authenticator says whether a password belongs to a name.  Sessions, throttling and the users' list are
the core's.  The built-in `local` keeps argon2id hashes in the store.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel

from dispatcher.plugin.deadline import Deadline

API_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who signed in.

    :ivar user: the name as the directory spells it; the core brings it into canonical form.
    """

    user: str


class Authenticator(ABC):
    """Verifies passwords.  One instance per installation."""

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION
    #: Validates ``[auth.NAME]``.  Forbid extra keys.
    Options: ClassVar[type[BaseModel]]

    def __init__(self, *, options: BaseModel) -> None:
        """Keep the options.  Must not connect anywhere."""
        self.options = options

    @abstractmethod
    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        """Return who `name` is when the password is right, else None; takes alike long for unknown names.

        :raises Unavailable: the directory cannot be asked.
        """

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        """Change the password, where the authenticator keeps it.

        :raises Unsupported: passwords are kept elsewhere; the error says where.
        """
        from dispatcher.plugin.errors import Unsupported

        raise Unsupported(
            f"Passwords are not kept by the authenticator {self.name}", fix="change it in the directory"
        )

    def close(self) -> None:
        """Release connections."""
