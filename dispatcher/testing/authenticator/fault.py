"""The directory is down or silent: `Unavailable` in time, the same for all, without a secret."""

from __future__ import annotations

from functools import partial

import pytest

from dispatcher.plugin.authenticator import Authenticator
from dispatcher.plugin.errors import Unavailable
from dispatcher.testing.authenticator.answers import UNKNOWN, WRONG
from dispatcher.testing.authenticator.asker import Answer, Asker, at_once, in_time, unavailable
from dispatcher.testing.authenticator.base import AuthenticatorBase, needs_directory
from dispatcher.testing.authenticator.secrecy import forms
from dispatcher.testing.driver import expect
from dispatcher.testing.kit import eventually


class FaultChecks(AuthenticatorBase):
    """What an authenticator does when its directory does not do its part."""

    @needs_directory
    def test_directory_down_is_unavailable(self, ask: Asker, alice: tuple[str, str]) -> None:
        """Without a directory the right password and a wrong one raise `Unavailable` with words, quickly."""
        ask.accepted(*alice)
        with self.broken_directory("down"):
            for password in (alice[1], WRONG):
                answer = ask(alice[0], password)
                unavailable(answer, "with the directory down")
                expect(
                    answer.seconds < self.patience,
                    f"authenticate() took {answer.seconds:.1f} s to see that the directory is down",
                )

    @needs_directory
    def test_outage_is_the_same_for_all(self, ask: Asker, alice: tuple[str, str]) -> None:
        """During an outage unknown names get the same answer as known ones: no answer comes from a cache."""
        ask.accepted(*alice)
        with self.broken_directory("down"):
            known, unknown = ask(alice[0], WRONG), ask(UNKNOWN, WRONG)
        expect(
            type(known.error) is type(unknown.error) and known.value == unknown.value,
            f"with the directory down authenticate() {known} for a known name and {unknown} for an unknown one",
        )

    @needs_directory
    def test_outage_shows_no_password(
        self, ask: Asker, alice: tuple[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """The errors and the log of an outage hold no password."""
        wrong = "kit-wrong pass/word"
        with caplog.at_level("WARNING"), self.broken_directory("down"):
            errors = [ask(alice[0], password).error for password in (alice[1], wrong)]
        shown = caplog.text + " ".join(f"{error} {getattr(error, 'details', '')}" for error in errors)
        for password in (alice[1], wrong):
            expect(
                not any(form in shown for form in forms(alice[0], password)),
                f"an error of an outage holds the password ({shown[:200]}): write what failed in your own words",
            )

    @needs_directory
    def test_silent_directory_meets_the_deadline(self, ask: Asker, alice: tuple[str, str]) -> None:
        """Calls to a directory that does not answer, from many threads, raise `Unavailable` in time."""
        ask.accepted(*alice)

        def call(password: str) -> Answer:
            return ask(alice[0], password, seconds=self.silent_seconds)

        with self.broken_directory("silent"):
            for answer in at_once([partial(call, password) for password in (alice[1], WRONG) * 3]):
                unavailable(answer, "with a silent directory")
        self._works_again(ask, alice, "silent")

    @needs_directory
    def test_instance_is_made_without_a_directory(self, authenticator: Authenticator) -> None:
        """An instance can be made and closed while the directory is down."""
        with self.broken_directory("down"):
            answer = in_time("__init__", lambda: self.another(authenticator).close(), self.patience, self.slack)
        expect(answer.error is None, f"with the directory down __init__ or close() {answer}: connect later")

    @needs_directory
    def test_instance_works_again_after_an_outage(self, ask: Asker, alice: tuple[str, str]) -> None:
        """After an outage the same instance works: it does not keep a dead connection, and does not wait long."""
        ask.accepted(*alice)
        with self.broken_directory("down"):
            ask(*alice)
        self._works_again(ask, alice, "down")
        ask.not_accepted(alice[0], WRONG, "a wrong password after an outage")

    @needs_directory
    def test_set_password_during_an_outage(self, ask: Asker, bob: tuple[str, str]) -> None:
        """`set_password` without a directory raises `Unavailable` (or `Unsupported`), and changes nothing."""
        if self.changes_passwords:
            with self.broken_directory("down"):
                answer = ask.call("set_password", bob[0], "kit new password")
            expect(
                isinstance(answer.error, Unavailable),
                f"set_password() {answer} with the directory down: raise Unavailable",
            )
        ask.accepted(*bob)

    def _works_again(self, ask: Asker, alice: tuple[str, str], how: str) -> None:
        __tracebackhide__ = True
        expect(
            eventually(lambda: ask(*alice).accepted, self.patience, 0.1),
            f"{self.patience:g} s after the directory was {how} the instance does not work: connect again",
        )
