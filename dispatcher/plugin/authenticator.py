"""The authenticator contract, version 1: plugins subclass `Authenticator` or `WebAuthenticator`.

An `Authenticator` verifies names and passwords; a `WebAuthenticator` lets another web site sign users in (OpenID
Connect).  The core has the sessions, rate limits and the list of users.  The built-in `local` keeps argon2id
hashes in the database.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
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
    """A user, as the directory describes it.

    :ivar user: the name in the directory's spelling; the core converts it to canonical form.
    :ivar groups: names of the groups that the user is a member of, at most 1,000.
    :ivar subject: a permanent identifier of the account, at most 255 characters: another person who gets the same
        name later has another one.  None if the directory has no such identifier.
    """

    user: str
    groups: frozenset[str] = frozenset()
    subject: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebIdentity(Identity):
    """A user who signed in at another site.

    :ivar session: identifies the session there, if `WebAuthenticator.ended` can name it, at most 255 characters.
    :ivar kept: what `WebAuthenticator.sign_out_url` needs, at most 16 KiB; the core keeps it with the session.
    """

    session: str | None = None
    kept: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """The beginning of a sign-in at another site.

    :ivar url: to which the browser is sent; contains the `state`.
    :ivar kept: what `WebAuthenticator.finish` needs, at most 16 KiB.  It never leaves the manager.
    """

    url: str
    kept: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Sessions that ended at another site: one, or without `session` all of the account.

    :ivar session: as in `WebIdentity`; :ivar subject: as in `Identity`.  At least one is given.  With both,
        sessions of the account whose `WebIdentity.session` is None end, too: they may be the one.
    """

    session: str | None = None
    subject: str | None = None


class BaseAuthenticator(ABC):
    """What both kinds have in common.  One instance per entry of ``auth.authenticator``."""

    name: ClassVar[str]
    #: Version of the contract that the class follows; a class that does not set it follows version 1.
    api_version: ClassVar[int] = 1
    #: Validates ``[auth.NAME]``.  Forbid extra keys.
    Options: ClassVar[type[BaseModel]]
    #: Whether there can be several: each has a table ``[auth.NAME.OWN]``, and is configured as ``NAME.OWN``.
    several: ClassVar[bool] = False

    def __init__(self, *, options: BaseModel) -> None:
        """Keep the options.  Must not open connections."""
        self.options = options

    def lookup(self, name: str, *, deadline: Deadline) -> Identity | None:
        """Return a user's entry in the directory; None if the account no longer exists or may no longer sign in.

        Called without a password, for users who have signed in before.

        :raises Unsupported: users cannot be looked up without their passwords.
        :raises Unavailable: the directory does not answer.
        """
        raise Unsupported(
            f"The authenticator {self.name} cannot look up users",
            fix="let the user sign in; the manager's log says why a sign-in is refused",
        )

    def check(self, *, deadline: Deadline) -> None:
        """Verify, for `dispatcher doctor`, that users can sign in; by default nothing is verified.

        :raises Unavailable: users cannot sign in, with the reason.
        """

    def close(self) -> None:
        """Release connections."""


class Authenticator(BaseAuthenticator):
    """Verifies passwords."""

    #: Whether `set_password` changes passwords; None: if it is overridden.  Without, users see no form for it.
    changes_passwords: ClassVar[bool | None] = None

    @property
    def refusal_time(self) -> float:
        """Minimum time of a refusal in seconds; in a list, refusals by the other authenticators take as long."""
        return 0.0

    @abstractmethod
    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        """Return the identity of `name`, or None for a wrong password; takes the same time for an unknown name.

        :raises Unavailable: the directory does not answer.
        """

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        """Change the password, if the authenticator stores it.

        :raises Unsupported: passwords are kept elsewhere; the error names the place.
        """
        raise Unsupported(
            f"Passwords are not kept by the authenticator {self.name}", fix="change it in the directory"
        )


class WebAuthenticator(BaseAuthenticator):
    """Sends the browser to another site, which sends it back with the result."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The name of the site on the sign-in page: "Sign in with TITLE"."""

    @abstractmethod
    def begin(self, *, state: str, callback: str, deadline: Deadline) -> Redirect:
        """Begin a sign-in.

        :param state: 43 letters, digits, `-` and `_`, which the site sends back unchanged.  The core ties it to
            the browser, accepts it once, and only for some minutes.
        :param callback: the URL to which the site sends the browser.
        :raises Unavailable: the site does not answer, or is configured wrongly.
        """

    @abstractmethod
    def finish(
        self, parameters: Mapping[str, str], *, kept: str, callback: str, deadline: Deadline
    ) -> WebIdentity | None:
        """Return who signed in, None if the site or the options refuse the user.

        :param parameters: of the query in the browser's request to `callback`; not to be trusted.
        :param kept: of the `Redirect`; :param callback: as for `begin`.
        :raises Forbidden: like None, with a reason for the log.
        :raises BadRequest: the site does not accept the parameters; the user can start again.
        :raises Unavailable: the site does not answer, or not as it should.
        """

    def ended(self, token: str, *, deadline: Deadline) -> Ended | None:
        """Verify a message of the site that a session ended there; return which, None if it is not authentic.

        :param token: for OpenID Connect the logout token (OpenID Connect Back-Channel Logout 1.0, section 2.4).
        :raises Unavailable: it cannot be verified now.
        """
        return None

    def sign_out_url(self, *, kept: str, callback: str, deadline: Deadline) -> str | None:
        """Return the URL at which the browser ends the session at the site, too; None if there is none.

        :param kept: of the `WebIdentity`; :param callback: the URL to which the site sends the browser afterwards.
        """
        return None
