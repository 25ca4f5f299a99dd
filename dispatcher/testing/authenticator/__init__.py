"""The contract of authenticators: subclass `AuthenticatorContract`, give it an authenticator, run pytest.

    class TestMine(AuthenticatorContract):
        people = {"alice": "correct horse battery", "zoë": "schöne Grüße"}
        outsider = ("mallory", "let me in please")
        ...

`docs/reference/conformance-kit.md` describes all checks and settings.  Needs pytest.
"""

from __future__ import annotations

from dispatcher.testing.authenticator.answers import AnswerChecks
from dispatcher.testing.authenticator.declaration import DeclarationChecks
from dispatcher.testing.authenticator.fault import FaultChecks
from dispatcher.testing.authenticator.lookup import LookupChecks
from dispatcher.testing.authenticator.names import NameChecks
from dispatcher.testing.authenticator.secrecy import SecrecyChecks


class AuthenticatorContract(FaultChecks, SecrecyChecks, LookupChecks, NameChecks, AnswerChecks, DeclarationChecks):
    """Everything that an authenticator must do.  See `AuthenticatorBase` for what to fill in.

    The checks of the last base run first.
    """


__all__ = ["AuthenticatorContract"]
