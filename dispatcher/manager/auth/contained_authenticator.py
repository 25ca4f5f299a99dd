"""An authenticator, contained: its exceptions are translated, its results are checked, its health is known.

Strangers learn nothing of an outage: the error that they get is always the same, and the log has the reason.  The
password is masked there.  `HashPool` has the threads, and gives up calls that hang.
"""

from __future__ import annotations

import base64
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote, quote_plus

from dispatcher.common.contained import PluginRef, bounded, contained, text
from dispatcher.common.log import SECRET, logger
from dispatcher.common.plain import plain
from dispatcher.manager.backends.pool import current_job
from dispatcher.plugin.authenticator import Authenticator, Identity
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import BadRequest, Conflict, DispatcherError, Forbidden, Unavailable, Unsupported
from dispatcher.plugin.names import printable, user_name

CLOSE = 3.0  # seconds
SLACK = 5.0  # seconds past its deadline until a check is given up
RETRY = 5.0  # seconds until a browser may try again
#: Errors of `set_password` whose texts are for the user.
_FOR_USER = (BadRequest, Conflict, Forbidden, Unsupported)

_log = logger("manager.signin")


class ContainedAuthenticator:
    """The methods of `Authenticator` that the manager calls.  Raises nothing but `DispatcherError`.

    :param wrapped: None: it cannot be used at all, because of `problem`.
    :ivar problem: why passwords cannot be checked, as seen by the last call; None if they can.
    """

    def __init__(
        self, plugin: PluginRef, wrapped: Authenticator | None, problem: DispatcherError | None = None
    ) -> None:
        self.plugin = plugin
        self.name = plugin.name
        self.problem = problem
        self._wrapped = wrapped

    @property
    def changes_passwords(self) -> bool:
        """Whether users can change their passwords with it."""
        if self._wrapped is None:
            return False
        cls = type(self._wrapped)
        stated = cls.changes_passwords
        return stated if isinstance(stated, bool) else cls.set_password is not Authenticator.set_password

    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> str | None:
        """Return the canonical name of the user, None for a wrong name or password.

        :raises Unavailable: it cannot be said now, whatever the reason.
        """
        with self._call("authenticate", (name, password), deadline) as wrapped:
            found: object = wrapped.authenticate(name, password, deadline=deadline)
            if found is None:
                return None
            if inspect.iscoroutine(found):  # of a method that was declared with `async`
                found.close()
            if not isinstance(found, Identity):
                raise self._invalid(
                    f"found a value of the type {type(found).__name__}, expected an Identity or None"
                )
            user: object = plain(found.user)
            if not isinstance(user, str):
                raise self._invalid(f"user is of the type {type(user).__name__}, expected a text")
            try:
                return user_name(user)
            except BadRequest as error:
                raise self._invalid(f"user is {printable(text(user, 100))}: {error.why}") from None

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        """Change a password.

        :raises Unsupported: it is kept elsewhere; :raises BadRequest: it is refused, and so on;
        :raises Unavailable: it cannot be changed now.
        """
        with self._call("set_password", (name, password), deadline) as wrapped:
            wrapped.set_password(name, password, deadline=deadline)

    def check(self, *, deadline: Deadline) -> None:
        """Verify that passwords can be checked.

        :raises DispatcherError: what is wrong, for administrators.
        """
        if self._wrapped is None:
            assert self.problem is not None
            raise self.problem.with_traceback(None)
        wrapped = self._wrapped
        bounded(
            self.plugin,
            "check",
            lambda: wrapped.check(deadline=deadline),
            seconds=deadline.remaining() + SLACK,
            log=None,
            error=Unavailable,
        )

    def close(self) -> None:
        """`Authenticator.close`; exceptions are logged."""
        if self._wrapped is not None:
            with suppress(DispatcherError):
                bounded(self.plugin, "close", self._wrapped.close, seconds=CLOSE)

    def hung(self, error: DispatcherError) -> None:
        """Note that a call was given up."""
        self.problem = error

    @contextmanager
    def _call(self, method: str, secrets: tuple[str, str], deadline: Deadline) -> Iterator[Authenticator]:
        wrapped, job = self._wrapped, current_job()
        if wrapped is None:
            raise unavailable()
        try:
            with contained(self.plugin, method, log=None, error=Unavailable, secret=True):
                if job is None:
                    yield wrapped
                else:
                    with job.calling(self.plugin, method, deadline):
                        yield wrapped
        except DispatcherError as error:
            masked = [_without(part, *secrets) for part in (error.what, error.why, error.fix)]
            if method == "set_password" and isinstance(error, _FOR_USER):
                error.what, error.why, error.fix = masked
                raise
            problem = type(error)("")
            problem.what, problem.why, problem.fix = masked
            if self.problem is None or self.problem.what != problem.what:
                _log.error("the authenticator failed", plugin=str(self.plugin), call=method, why=str(problem))
            self.problem = problem
            raise unavailable(error.retry_after) from None
        self.problem = None

    def _invalid(self, why: str) -> DispatcherError:
        what = f"The {self.plugin} returned an invalid value from authenticate"
        return Unavailable(what, why=why, fix=self.plugin.report)


def unavailable(retry_after: float | None = None) -> Unavailable:
    """Return the error for an outage; strangers get no other."""
    return Unavailable(
        "Passwords cannot be checked at the moment",
        why="the manager's log has the reason",
        fix="try again later",
        retry_after=RETRY if retry_after is None else retry_after,
    )


def _without(shown: str, name: str, password: str) -> str:
    """Return a text without a password, plain or as it is often encoded."""
    if len(password) < 3:  # it is everywhere
        return SECRET if password and password in shown else shown
    pair = base64.b64encode(f"{name}:{password}".encode(errors="replace")).decode()
    forms = {
        password,
        repr(password)[1:-1],
        quote(password, errors="replace"),
        quote_plus(password, errors="replace"),
    }
    for form in sorted({*forms, pair, base64.b64encode(password.encode(errors="replace")).decode()}, key=len)[
        ::-1
    ]:
        shown = shown.replace(form, SECRET)
    return shown
