"""Passwords are seen nowhere, and nothing is left behind."""

from __future__ import annotations

import base64
import gc
import logging
from urllib.parse import quote, quote_plus

import pytest

from dispatcher.plugin.authenticator import Authenticator
from dispatcher.testing.authenticator.answers import UNKNOWN
from dispatcher.testing.authenticator.asker import Asker
from dispatcher.testing.authenticator.base import AuthenticatorBase
from dispatcher.testing.driver import expect
from dispatcher.testing.remains import expect_nothing_left

_REACH = 20_000  # objects that are looked at


class SecrecyChecks(AuthenticatorBase):
    """What is written, kept and left open."""

    def test_password_is_not_written(
        self,
        ask: Asker,
        alice: tuple[str, str],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """No password, right or wrong, plain or encoded, in the log at any level, on standard output or error."""
        caplog.set_level(logging.DEBUG)
        wrong = "kit-wrong pass/word"
        ask(*alice)
        ask(alice[0], wrong)
        ask(UNKNOWN, wrong)
        ask.call("set_password", alice[0], wrong) if not self.changes_passwords else None
        shown = caplog.text + "".join(capfd.readouterr())
        for record in caplog.records:
            shown += str(vars(record))
        for password in (alice[1], wrong):
            for form in forms(alice[0], password):
                expect(form not in shown, "a password is written to the log or the output: leave it out")

    def test_password_is_not_kept(self, ask: Asker, alice: tuple[str, str]) -> None:
        """After the answer no object of the instance holds a password, right or wrong."""
        wrong = "kit-wrong-password-that-is-kept"
        ask(*alice)
        ask(alice[0], wrong)
        for password in (alice[1], wrong):
            expect(
                not _holds(ask.authenticator, password),
                "the instance still holds a password after the answer: keep none, not even to answer sooner",
            )

    def test_calls_leave_nothing(self, ask: Asker, alice: tuple[str, str]) -> None:
        """Repeated calls leave no descriptor and no thread behind."""

        def cycle() -> None:
            ask(*alice)
            ask(UNKNOWN, "kit wrong password")

        advice = "reuse or close connections"
        expect_nothing_left(cycle, 6, "calls", descriptors=advice, threads=advice)

    def test_instances_release_everything(self, authenticator: Authenticator, alice: tuple[str, str]) -> None:
        """Closed instances leave no descriptor and no thread behind."""

        def cycle() -> None:
            other = self.another(authenticator)
            self.asker(other)(*alice)
            other.close()

        advice = "release everything in close()"
        expect_nothing_left(cycle, 6, "closed instances", descriptors=advice, threads=advice)


def forms(name: str, password: str) -> set[str]:
    """Return how a password may be spelled: plain, escaped, in a URL, in Basic authentication."""
    raw = password.encode(errors="replace")
    return {
        password,
        repr(password)[1:-1],
        quote(password),
        quote_plus(password),
        base64.b64encode(raw).decode(),
        base64.b64encode(f"{name}:{password}".encode(errors="replace")).decode(),
    }


def _holds(authenticator: Authenticator, password: str) -> bool:
    """Whether a text that the instance refers to, its options left out, holds the password."""
    raw = password.encode()
    skipped = {id(authenticator.options), id(type(authenticator))}
    seen: set[int] = set()
    queue: list[object] = list(vars(authenticator).values())
    while queue and len(seen) < _REACH:
        each = queue.pop()
        if id(each) in seen or id(each) in skipped or callable(each) or type(each).__name__ == "module":
            continue
        seen.add(id(each))
        if (isinstance(each, str) and password in each) or (isinstance(each, (bytes, bytearray)) and raw in each):
            return True
        queue += gc.get_referents(each)
    return False
