"""Right, wrong, unknown, empty, huge: who comes in, and how long it takes."""

from __future__ import annotations

import inspect
from functools import partial

import pytest

from dispatcher.plugin.authenticator import Authenticator, Identity
from dispatcher.plugin.errors import BadRequest, DispatcherError, Unavailable, Unsupported
from dispatcher.plugin.names import printable, user_name
from dispatcher.testing.authenticator.asker import CONTRACT, Asker, at_once
from dispatcher.testing.authenticator.base import AuthenticatorBase
from dispatcher.testing.base import needs_no
from dispatcher.testing.driver import expect

WRONG = "kit wrong password"
UNKNOWN = "kit-nobody"
#: Passwords that have a meaning in query languages, shells and formats.
META = (
    "*",
    "(*)",
    "*)(uid=*))(|(uid=*",
    "' OR '1'='1",
    "' OR 1=1 --",
    "%",
    "%s",
    "{0}",
    "$(id)",
    "..",
    "null",
    "\\",
)
_TIMES = 7  # calls of which the fastest counts


class AnswerChecks(AuthenticatorBase):
    """Passwords, people, time."""

    def test_right_password_is_an_identity(self, ask: Asker) -> None:
        """For everybody in `people`, `authenticate` returns an `Identity` whose `user` is a text."""
        for name, password in self._people():
            found = ask.accepted(name, password).value
            if inspect.iscoroutine(found):
                found.close()
            expect(
                isinstance(found, Identity),
                f"authenticate() returned {type(found).__name__}: return Identity(user=...); {CONTRACT}",
            )
            assert isinstance(found, Identity)
            expect(isinstance(found.user, str), f"Identity.user is {type(found.user).__name__}: make it a str")

    def test_identity_is_a_legal_name(self, ask: Asker) -> None:
        """`Identity.user` is a legal name of a user, and people have different ones."""
        users = []
        for name, password in self._people():
            answer = ask.accepted(name, password)
            try:
                users.append(user_name(answer.user))
            except BadRequest as error:
                pytest.fail(
                    f"Identity.user is {printable(answer.user)} for {printable(name)}: {error.why}; return "
                    "another name of the person, such as the e-mail address"
                )
        expect(len(set(users)) == len(users), f"several people are one user: {users}")

    def test_wrong_password_is_none(self, ask: Asker) -> None:
        """`authenticate` returns None for a wrong password, for every user."""
        for name, _ in self._people():
            found = ask.refused(name, WRONG, f"a wrong password of {printable(name)}").value
            expect(found is None, f"authenticate() returned {found!r} for a wrong password: return None")

    def test_unknown_name_is_none(self, ask: Asker, alice: tuple[str, str]) -> None:
        """`authenticate` returns None for an unknown name, too: nobody learns which users exist."""
        for password in (WRONG, alice[1]):
            ask.refused(UNKNOWN, password, "an unknown name")

    def test_unknown_name_takes_as_long_as_a_wrong_password(self, ask: Asker, alice: tuple[str, str]) -> None:
        """The answer for an unknown name takes as long as the one for a wrong password, give or take half."""

        def fastest(name: str) -> float:
            return min(ask(name, WRONG).seconds for _ in range(_TIMES))

        known, unknown = fastest(alice[0]), fastest(UNKNOWN)
        expect(
            abs(known - unknown) <= max(self.uniform_seconds, max(known, unknown) / 2),
            f"an unknown name takes {unknown * 1000:.0f} ms, a wrong password {known * 1000:.0f} ms, which tells "
            "who exists: compare with a hash that nothing matches when there is no such person",
        )

    def test_empty_password_is_refused(self, ask: Asker, alice: tuple[str, str]) -> None:
        """An empty password is refused: LDAP takes it for an anonymous bind, which succeeds."""
        ask.refused(alice[0], "", "an empty password")

    def test_password_is_taken_as_it_is(self, ask: Asker, alice: tuple[str, str]) -> None:
        """Blanks and line ends around a password are part of it."""
        name, password = alice
        for other in (f" {password}", f"{password} ", f"{password}\n", f"\t{password}\r\n", "   "):
            ask.not_accepted(name, other, f"a password with other blanks, {other!r}")

    def test_case_of_a_password_counts(self, ask: Asker, alice: tuple[str, str]) -> None:
        """The password in capital letters is a wrong password."""
        name, password = alice
        for other in {password.upper(), password.lower(), password.swapcase(), password.title()} - {password}:
            ask.not_accepted(name, other, f"the password in another case, {other!r}")

    def test_password_counts_as_a_whole(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A part of the password, the password with more text after it, or with a NUL and text, is refused."""
        name, password = alice
        for other in (password[:-1], password[1:], f"{password}x", password * 2, f"{password}\0x"):
            ask.not_accepted(name, other, f"a part of the password or more than it, {other!r}")

    def test_passwords_of_others_are_refused(self, ask: Asker) -> None:
        """Nobody can sign in with another user's password."""
        people = self._people()
        for (name, _), (other, password) in zip(people, people[1:] + people[:1], strict=True):
            ask.not_accepted(name, password, f"{printable(other)}'s password for {printable(name)}")

    def test_huge_password_is_refused(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A password of 10 kB is refused in time, even if the right one is its beginning."""
        name, password = alice
        for other in ("x" * 10_000, password + "x" * 10_000, "漢" * 10_000):
            ask.refused(name, other, "a password of 10 kB")

    def test_control_characters_are_refused(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A password of control characters is refused like any other."""
        for code in (*range(1, 32), 127, 0x85, 0x2028, 0xFEFF):
            ask.refused(alice[0], f"kit{chr(code)}x", f"a password with the character U+{code:04X}")

    def test_nul_character_is_refused(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A password with a NUL is refused like any other; some libraries raise."""
        for other in ("\0", "kit\0x"):
            ask.refused(alice[0], other, "a password with a NUL")

    def test_passwords_are_data(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A password that means something in a query language, a shell or a format is refused like any other."""
        for other in META:
            ask.refused(alice[0], other, f"the password {other!r}")

    def test_password_beyond_ascii_works(self, ask: Asker) -> None:
        """A password with letters beyond ASCII works, and one that differs in these letters is refused."""
        found = [(name, password) for name, password in self._people() if not password.isascii()]
        expect(found, "nobody in `people` has a password with letters beyond ASCII: give one to somebody")
        for name, password in found:
            ask.accepted(name, password, "the right password, which is not ASCII")
            other = "".join(char if char.isascii() else "?" for char in password)
            ask.not_accepted(name, other, f"another password, {other!r}")

    def test_wrong_password_beyond_ascii_is_none(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A wrong password in any script is refused, without an error (`hmac.compare_digest` raises one)."""
        for other in ("pässwörd", "пароль", "密码密码", "\N{KEY}\N{LOCK}", "\u202eabc"):
            ask.refused(alice[0], other, f"the wrong password {printable(other)}")

    def test_unencodable_password_is_none(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A password with half a surrogate pair, which JSON allows and UTF-8 does not, is refused."""
        for other in ("\ud800", f"{alice[1]}\udc80"):
            ask.refused(alice[0], other, "a password that is not Unicode (encode with errors='surrogatepass')")

    @needs_no("no_outsider")
    def test_outsider_is_refused(self, ask: Asker) -> None:
        """Somebody who may not sign in (of another group, locked) is refused like a wrong password."""
        name, password = self.outsider
        if not name:
            self._must("outsider, or set no_outsider to the reason why there is none")
        ask.refused(name, password, f"the right password of {printable(name)}, who may not sign in")
        ask.refused(name, WRONG, f"a wrong password of {printable(name)}")

    def test_answer_does_not_depend_on_the_past(self, ask: Asker, alice: tuple[str, str]) -> None:
        """After a right password a wrong one is refused, and after many wrong ones the right one works."""
        ask.accepted(*alice)
        for number in range(12):
            ask.not_accepted(alice[0], f"{WRONG} {number}", "a wrong password after the right one")
        ask.accepted(*alice, "the right password, after wrong ones (the core limits attempts)")

    def test_fresh_instance_gives_the_same_answer(self, ask: Asker, alice: tuple[str, str]) -> None:
        """A fresh instance, as after a restart of the manager, gives the same answers."""
        other = self.another(ask.authenticator)
        try:
            first, again = ask.accepted(*alice), self.asker(other).accepted(*alice)
            expect(first.user == again.user, f"a fresh instance finds {again.user!r} instead of {first.user!r}")
            self.asker(other).not_accepted(alice[0], WRONG, "a wrong password, by a fresh instance")
        finally:
            other.close()

    def test_many_at_once(self, ask: Asker) -> None:
        """With many sign-ins at the same time, from many threads, each gets its own answer."""
        people = self._people()
        wanted = {name: ask.accepted(name, password).user for name, password in people}

        def sign_in(at: int) -> None:
            name, password = people[at % len(people)]
            for _ in range(2):
                if at % 3:
                    found = ask.accepted(
                        name, password, "the right password, with other sign-ins at the same time"
                    ).user
                    expect(found == wanted[name], f"{name!r} got the answer {found!r}, about somebody else")
                else:
                    ask.not_accepted(name, WRONG, "a wrong password, with other sign-ins at the same time")

        at_once([partial(sign_in, at) for at in range(9)])

    def test_expired_deadline_is_no_wrong_password(self, ask: Asker, alice: tuple[str, str]) -> None:
        """With no time left, the right password is accepted or the error is `Unavailable`, at once."""
        answer = ask(*alice, seconds=0)
        expect(
            answer.accepted or isinstance(answer.error, Unavailable),
            f"authenticate() {answer} for the right password with no time left: raise DeadlineExceeded",
        )

    def test_set_password_works_or_is_unsupported(
        self, ask: Asker, authenticator: Authenticator, bob: tuple[str, str]
    ) -> None:
        """`set_password` changes the password, or raises `Unsupported` that says where it is changed."""
        name, old = bob
        new = "kit new password"
        if not self.changes_passwords:
            answer = ask.call("set_password", name, new)
            expect(
                isinstance(answer.error, Unsupported) and answer.error.fix,
                f"set_password() {answer}: leave it out, raise Unsupported with `fix`, or set changes_passwords",
            )
            ask.accepted(name, old)
            return
        try:
            answer = ask.call("set_password", name, new)
            expect(answer.error is None, f"set_password() {answer}")
            ask.accepted(name, new, "the new password")
            ask.not_accepted(name, old, "the old password, after set_password()")
        finally:
            ask.call("set_password", name, old)
        ask.accepted(name, old)

    def test_set_password_of_nobody_is_an_error(self, ask: Asker) -> None:
        """`set_password` of an unknown person raises an error of dispatcher, and creates nobody."""
        answer = ask.call("set_password", UNKNOWN, "kit new password")
        expect(
            isinstance(answer.error, DispatcherError),
            f"set_password() {answer} for an unknown name: raise NotFound (or Unsupported)",
        )
        ask.not_accepted(UNKNOWN, "kit new password", "a person that set_password() created")
