"""What an authenticator says of users: groups, the account's identifier, and `lookup` without a password."""

from __future__ import annotations

from dispatcher.plugin.authenticator import Identity
from dispatcher.plugin.errors import Unavailable, Unsupported
from dispatcher.plugin.names import printable
from dispatcher.testing.authenticator.answers import META, UNKNOWN
from dispatcher.testing.authenticator.asker import Asker
from dispatcher.testing.authenticator.base import AuthenticatorBase, needs_directory
from dispatcher.testing.driver import expect

MAX_GROUPS, MAX_TEXT = 1000, 255


class LookupChecks(AuthenticatorBase):
    """`dispatcher sync` acts on these answers: it changes groups and signs out those who have left."""

    def test_groups_are_names(self, ask: Asker) -> None:
        """`Identity.groups` of `authenticate` is a frozenset of at most 1,000 printable names."""
        for name, password in self._people():
            found = ask.accepted(name, password).value
            groups: object = getattr(found, "groups", frozenset())
            good = isinstance(groups, frozenset) and all(map(_is_text, groups)) and len(groups) <= MAX_GROUPS
            expect(
                good, f"Identity.groups of {printable(name)} is {printable(groups)}: make it a frozenset of texts"
            )

    def test_subject_identifies_the_account(self, ask: Asker) -> None:
        """`Identity.subject` of `authenticate` is None, or a text of at most 255 characters, one for each user."""
        subjects = []
        for name, password in self._people():
            found = ask.accepted(name, password).value
            subject: object = getattr(found, "subject", None)
            if subject is not None:
                expect(_is_text(subject), f"Identity.subject of {printable(name)} is {printable(subject)}")
                subjects.append(subject)
        expect(len(set(subjects)) == len(subjects), f"several people have one subject: {subjects}")

    def test_lookup_agrees_with_the_sign_in(self, ask: Asker) -> None:
        """`lookup` returns what `authenticate` returns for the right password, or raises `Unsupported`."""
        for name, password in self._people():
            found = ask.accepted(name, password).value
            answer = ask.call("lookup", name)
            if not isinstance(answer.error, Unsupported) and isinstance(found, Identity):
                expect(
                    answer.error is None and answer.value == found,
                    f"lookup() {answer} and authenticate() returned {printable(found)} for {printable(name)}",
                )

    def test_lookup_of_nobody_is_none(self, ask: Asker) -> None:
        """`lookup` returns None for unknown names, for names with a meaning elsewhere, and for the outsider."""
        names = (UNKNOWN, *META, *([self.outsider[0]] if self.outsider[0] else []))
        for name in names:
            answer = ask.call("lookup", name)
            if not isinstance(answer.error, Unsupported):
                expect(
                    answer.error is None and answer.value is None,
                    f"lookup() {answer} for {printable(name)}, who may not sign in: return None",
                )

    @needs_directory
    def test_lookup_without_a_directory_is_unavailable(self, ask: Asker, alice: tuple[str, str]) -> None:
        """`lookup` never returns None during an outage, but raises `Unavailable`: None signs the user out."""
        if isinstance(ask.call("lookup", alice[0]).error, Unsupported):
            return
        for how in ("down", "silent"):
            with self.broken_directory(how):
                answer = ask.call("lookup", alice[0], seconds=self.silent_seconds)
            expect(
                isinstance(answer.error, Unavailable) or (answer.error is None and answer.value is not None),
                f"lookup() {answer} with the directory {how}: raise Unavailable.  None would sign the user out",
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()
