"""Calls an authenticator, each call in a thread with a deadline: one that blocks is a verdict and no hang.

An answer is kept as it came, so that each fault is judged by one check: the others read `accepted` and `user`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from dispatcher.plugin.authenticator import Authenticator, Identity
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, Unavailable
from dispatcher.plugin.names import printable
from dispatcher.testing.driver import expect
from dispatcher.testing.verdict import Hangs, within

CONTRACT = "see dispatcher.plugin.Authenticator"


@dataclass(frozen=True)
class Answer:
    """What became of a call.

    :ivar value: what it returned; :ivar error: what it raised instead; :ivar seconds: how long it took.
    """

    value: object
    error: BaseException | None
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether the person may come in."""
        return self.error is None and bool(self.value)

    @property
    def user(self) -> str:
        """The user, as well as it can be read."""
        return str(self.value.user) if isinstance(self.value, Identity) else str(self.value)

    def __str__(self) -> str:
        if self.error is not None:
            return f"raised {type(self.error).__name__} ({self.error})"
        return "returned None" if self.value is None else f"returned {printable(self.value)}"


class Asker:
    """Asks an authenticator.

    :param patience: seconds that a call may take; :param slack: seconds past its deadline.
    """

    def __init__(self, authenticator: Authenticator, *, patience: float, slack: float) -> None:
        self.authenticator = authenticator
        self.patience = patience
        self.slack = slack

    def __call__(self, name: str, password: str, *, seconds: float | None = None) -> Answer:
        """Return the answer to a name and a password.

        :param seconds: until the deadline of the call; by default `patience`.
        """
        __tracebackhide__ = True
        return self.call("authenticate", name, password, seconds=seconds)

    def call(self, method: str, *arguments: Any, seconds: float | None = None) -> Answer:
        """Call a method that takes a deadline; fail where it does not return."""
        __tracebackhide__ = True
        allowed = self.patience if seconds is None else seconds

        def run() -> object:
            return getattr(self.authenticator, method)(*arguments, deadline=Deadline(allowed))

        advice = "by deadline.remaining(), and raise Unavailable when it is over"
        return in_time(f"{method}()", run, allowed, self.slack, advice)

    def accepted(self, name: str, password: str, what: str = "the right password") -> Answer:
        """Expect that somebody may come in."""
        __tracebackhide__ = True
        answer = self(name, password)
        expect(
            answer.accepted, f"authenticate() {answer} for {printable(name)} and {what}: return Identity(user=...)"
        )
        return answer

    def refused(self, name: str, password: str, what: str) -> Answer:
        """Expect that somebody is refused like anybody with a wrong password."""
        __tracebackhide__ = True
        answer = self.not_accepted(name, password, what)
        if answer.error is not None:
            self._refused_by_error(answer, what)
        return answer

    def not_accepted(self, name: str, password: str, what: str) -> Answer:
        """Expect that somebody does not come in; errors of dispatcher are another check's matter."""
        __tracebackhide__ = True
        answer = self(name, password)
        if answer.error is not None and not isinstance(answer.error, DispatcherError):
            self._refused_by_error(answer, what)
        expect(not answer.accepted, f"authenticate() accepted {what}: return None")
        return answer

    @staticmethod
    def _refused_by_error(answer: Answer, what: str) -> NoReturn:
        __tracebackhide__ = True
        pytest.fail(f"authenticate() {answer} for {what}: return None, as for any wrong password")


def in_time(
    what: str, work: Callable[[], object], allowed: float, slack: float, advice: str = "in time"
) -> Answer:
    """Return what became of a call; fail where it takes longer than `allowed` and `slack` seconds.

    :param advice: by what every wait should be bounded.
    """
    __tracebackhide__ = True
    began = time.monotonic()
    try:
        value = within(allowed + slack, work)
    except Hangs:
        pytest.fail(
            f"{what} has not returned {slack:g} s after its deadline of {allowed:g} s: bound every wait {advice}"
        )
    except BaseException as error:  # SystemExit too: it is a verdict
        return Answer(None, error, time.monotonic() - began)
    return Answer(value, None, time.monotonic() - began)


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Make calls at the same time; return their results, raise the first failure."""
    found: list[Any] = [None] * len(calls)

    def run(at: int) -> None:
        try:
            found[at] = calls[at]()
        except BaseException as failure:  # a verdict of pytest, too
            found[at] = failure

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def unavailable(answer: Answer, when: str) -> DispatcherError:
    """Expect `Unavailable`, with words for the operator."""
    __tracebackhide__ = True
    if not isinstance(answer.error, Unavailable):
        pytest.fail(
            f"authenticate() {answer} {when}: raise Unavailable.  None would tell somebody who knows the password "
            "that it is wrong, and count against them"
        )
    expect(
        isinstance(answer.error.what, str) and answer.error.what and (answer.error.why or answer.error.fix),
        f"authenticate() raised Unavailable without words {when}: say what happened, why, and what to do; the "
        "manager's log shows it",
    )
    return answer.error
