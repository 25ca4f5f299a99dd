"""Names: empty, long, in other spellings, with a meaning elsewhere."""

from __future__ import annotations

import contextlib
import unicodedata

from dispatcher.plugin.errors import BadRequest
from dispatcher.plugin.names import printable, user_name
from dispatcher.testing.authenticator.answers import META
from dispatcher.testing.authenticator.asker import Asker
from dispatcher.testing.authenticator.base import AuthenticatorBase
from dispatcher.testing.driver import expect


class NameChecks(AuthenticatorBase):
    """The core passes canonical names; an authenticator must not depend on it."""

    def test_empty_name_is_refused(self, ask: Asker, alice: tuple[str, str]) -> None:
        """An empty name is refused, whatever the password."""
        for password in ("", alice[1]):
            ask.not_accepted("", password, "an empty name")

    def test_long_name_is_refused(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A name of 255 characters, the longest there is, is refused in time."""
        for name in ("a" * 255, "漢" * 255, (alice[0] * 255)[:255]):
            ask.not_accepted(name, alice[1], "a name of 255 characters")

    def test_names_are_data(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A name that means something in a query language, a path or a file stands for nobody else."""
        name, password = alice
        cut = name[:-1]
        patterns = [f"{cut}{mark}" for mark in "*?%_."]
        others = [f"{name}{more}" for more in (")(uid=*", "' --", ":x", "\n", "\0x")]
        for other in (*META, *patterns, *others, f"./{name}", f"#{name}"):
            ask.not_accepted(other, password, f"the name {other!r} with the password of {name!r}")

    def test_spellings_of_a_name_are_one_user(self, ask: Asker) -> None:
        """Another spelling of a name (case, composed or wide letters) is refused, or is the same user."""
        for name, password in self._people():
            user = user_name_of(ask.accepted(name, password).user)
            wide = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in name)
            for other in {name.upper(), name.title(), unicodedata.normalize("NFD", name), wide} - {name}:
                answer = ask(other, password)
                if answer.accepted:
                    expect(
                        user_name_of(answer.user) == user,
                        f"{printable(other)} is {answer.user!r}, and {printable(name)} is {user!r}: return the "
                        "directory's own spelling of the name",
                    )

    def test_forms_of_a_password_are_no_fault(self, ask: Asker) -> None:
        """A password in another Unicode form (NFC, NFD, NFKC) is the same one or a wrong one, not an error."""
        for name, password in self._people():
            user = ask.accepted(name, password).user
            for form in ("NFC", "NFD", "NFKC", "NFKD"):
                answer = ask(name, unicodedata.normalize(form, password))
                expect(
                    answer.error is None and (not answer.accepted or answer.user == user),
                    f"authenticate() {answer} for the password of {printable(name)} in the form {form}",
                )


def user_name_of(user: str) -> str:
    """Return the canonical form of a name; as it is, where it has none."""
    with contextlib.suppress(BadRequest):
        return user_name(user)
    return user
