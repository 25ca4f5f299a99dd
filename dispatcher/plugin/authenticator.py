"""The authenticator contract, version 1: plugins subclass `Authenticator`.

An authenticator verifies names and passwords.  The core has the sessions, rate limits and the list of users.  The
built-in `local` keeps argon2id hashes in the database.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Unsupported

#: Versions of the contract that this release accepts, the oldest first.
API_VERSIONS = range(1, 2)
#: The newest of them.
API_VERSION = API_VERSIONS[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The user who signed in.

    :ivar user: the name in the directory's spelling; the core converts it to canonical form.
    """

    user: str


class Authenticator(ABC):
    """Verifies passwords.  One instance per installation."""

    name: ClassVar[str]
    #: Version of the contract that the class follows; a class that does not set it follows version 1.
    api_version: ClassVar[int] = 1
    #: Validates ``[auth.NAME]``.  Forbid extra keys.
    Options: ClassVar[type[BaseModel]]
    #: Whether `set_password` changes passwords; None: if it is overridden.  Without, users see no form for it.
    changes_passwords: ClassVar[bool | None] = None

    def __init__(self, *, options: BaseModel) -> None:
        """Keep the options.  Must not open connections."""
        self.options = options

    @abstractmethod
    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        """Return the identity of `name`, or None for a wrong password; takes the same time for an unknown name.

        :raises Unavailable: the directory does not answer.
        """

    def check(self, *, deadline: Deadline) -> None:
        """Verify, for `dispatcher doctor`, that passwords can be checked; by default nothing is verified.

        :raises Unavailable: what is wrong.
        """

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        """Change the password, if the authenticator stores it.

        :raises Unsupported: passwords are kept elsewhere; the error names the place.
        """
        raise Unsupported(
            f"Passwords are not kept by the authenticator {self.name}", fix="change it in the directory"
        )

    def close(self) -> None:
        """Release connections."""
