"""Settings and hooks for the author of an authenticator, and the fixtures of the checks."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import pytest

from dispatcher.plugin.authenticator import Authenticator
from dispatcher.testing.authenticator.asker import Asker
from dispatcher.testing.base import needs_no
from dispatcher.testing.fixtures import limit_fixtures
from dispatcher.testing.verdict import PAGE

_Check = TypeVar("_Check", bound=Callable[..., None])


class AuthenticatorBase:
    """Settings, hooks for the author, fixtures.

    Must be overridden: the fixture `authenticator`, `people`, `outsider` (or `no_outsider`) and `broken_directory`
    (or `no_directory`).  All else may be.
    """

    #: People who may sign in, with their passwords: at least two; one password has letters beyond ASCII.
    people: ClassVar[Mapping[str, str]] = {}
    #: Somebody in the directory who may not sign in (of another group, locked), with the right password.
    outsider: ClassVar[tuple[str, str]] = ("", "")
    #: Why there is no such person ("everybody in the file may sign in"); empty if there is one.
    no_outsider: ClassVar[str] = ""
    #: Why no directory can be down ("the manager's own database"); empty if one can.
    no_directory: ClassVar[str] = ""
    #: Why no distribution declares it ("part of the core"); empty if one does.
    no_entry_point: ClassVar[str] = ""
    #: Whether it can change passwords.
    changes_passwords: ClassVar[bool] = False
    #: Maximum seconds of one sign-in.
    patience: ClassVar[float] = 5.0
    #: Seconds that a call may take past its deadline.
    slack: ClassVar[float] = 1.0
    #: Seconds that calls to a silent directory get.
    silent_seconds: ClassVar[float] = 1.0
    #: Seconds by which the times for unknown names and wrong passwords may differ, if they do not differ by half.
    uniform_seconds: ClassVar[float] = 0.01

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let verdicts say what to read; leave out the checks for which the class states that there is nothing."""
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("dispatcher."):
            for name, check in list(vars(cls).items()):
                if name.startswith("test_"):
                    setattr(cls, name, _with_places(check))
        for name in dir(cls):
            setting = getattr(getattr(cls, name), "left_out_by", "")
            if setting and getattr(cls, setting):
                setattr(cls, name, None)

    # -- for the author ----------------------------------------------------------------------------------

    @pytest.fixture
    def authenticator(self) -> Authenticator:
        """Return the authenticator under test, made with options.  Must be overridden.

        All instances of one class use one directory.
        """
        self._must("the fixture authenticator(self)")

    def another(self, authenticator: Authenticator) -> Authenticator:
        """Return a fresh instance for the same directory."""
        return type(authenticator)(options=authenticator.options)

    def broken_directory(self, how: str) -> AbstractContextManager[None]:
        """Return a context in which the directory is broken.  Must be overridden unless `no_directory` is set.

        :param how: "down" (it refuses connections, or the file is missing) or "silent" (it accepts requests and
            does not answer).  Where silence is impossible, as with a file, "silent" may be the same as "down".
        """
        self._must(f"broken_directory({how!r}), or set no_directory to the reason why there is none")

    # -- fixtures ----------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _limited_fixtures(self, request: pytest.FixtureRequest) -> None:
        """Limit the time of the author's fixture."""
        limit_fixtures(request)

    @pytest.fixture
    def ask(self, authenticator: Authenticator) -> Asker:
        """The authenticator under test, each call with a deadline."""
        return self.asker(authenticator)

    @pytest.fixture
    def alice(self) -> tuple[str, str]:
        """Somebody who may sign in, with the password."""
        return self._people()[0]

    @pytest.fixture
    def bob(self) -> tuple[str, str]:
        """Somebody else."""
        return self._people()[1]

    def asker(self, authenticator: Authenticator) -> Asker:
        """Return what asks an instance."""
        return Asker(authenticator, patience=self.patience, slack=self.slack)

    def _people(self) -> list[tuple[str, str]]:
        if len(self.people) < 2:
            self._must("people: at least two")
        return list(self.people.items())

    def _must(self, what: str) -> NoReturn:
        pytest.fail(f"{type(self).__name__} must override {what}; see docs/reference/conformance-kit.md")


def _with_places(check: _Check) -> _Check:
    """Return a check whose verdict names its description and the contract's lines about the method."""

    @functools.wraps(check)
    def judged(*arguments: Any, **fixtures: Any) -> None:
        __tracebackhide__ = True
        try:
            check(*arguments, **fixtures)
        except pytest.fail.Exception as verdict:
            verdict.msg = "\n".join([verdict.msg or "", *places(check)])
            raise

    return cast("_Check", judged)


def places(check: Callable[..., None]) -> list[str]:
    """Return what to read about a check: its description, the contract's lines, the guide."""
    about = " ".join((inspect.getdoc(check) or "").split())
    named = re.search(r"`(set_password|lookup|close|__init__)`", about)
    method = named[1] if named else "authenticate"
    line = inspect.getsourcelines(getattr(Authenticator, method))[1]
    return [
        f"The check `{check.__name__.removeprefix('test_')}` ({PAGE}): {about}",
        f"Read {inspect.getfile(Authenticator)}:{line} Authenticator.{method}",
        "Read docs/howto/write-an-authenticator.md",
    ]


#: A check that needs a directory which can be broken.
needs_directory = needs_no("no_directory")
