"""An authenticator, contained: its exceptions are translated, its results are checked, its health is known.

Strangers learn nothing of an outage: the error that they get is always the same, and the log has the reason.  The
password is masked there.  `HashPool` has the threads, and gives up calls that hang.
"""

from __future__ import annotations

import base64
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from urllib.parse import quote, quote_plus, urlsplit

from dispatcher.common.contained import PluginRef, bounded, contained, text
from dispatcher.common.log import SECRET, logger
from dispatcher.common.plain import plain
from dispatcher.manager.backends.pool import current_job
from dispatcher.plugin.authenticator import (
    Authenticator,
    BaseAuthenticator,
    Ended,
    Identity,
    Redirect,
    WebAuthenticator,
    WebIdentity,
)
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import BadRequest, Conflict, DispatcherError, Forbidden, Unavailable, Unsupported
from dispatcher.plugin.names import printable, user_name

CLOSE = 3.0  # seconds
SLACK = 5.0  # seconds past its deadline until a check is given up
MAX_GROUPS = 1000  # of one user
MAX_NAME = 255  # characters of a group, of a subject
MAX_TITLE = 64  # characters
MAX_KEPT = 16384  # characters
MAX_REFUSAL = 10.0  # seconds
MAX_URL = 16384  # characters
MAX_USER = 4096  # characters; the rules of names allow fewer, and say so
SLOW = 1.0  # seconds after which a call is slow
MAX_SLOW = 8  # slow calls of an authenticator that does not work; more would take the places of the others
RETRY = 5.0  # seconds until a browser may try again
#: Errors of `set_password` whose texts are for the user.
_FOR_USER = (BadRequest, Conflict, Forbidden, Unsupported)

_log = logger("manager.signin")


class ContainedAuthenticator:
    """The methods of an authenticator that the manager calls.  Raises nothing but `DispatcherError`.

    :param wrapped: None: it cannot be used at all, because of `problem`.
    :ivar name: the entry of ``auth.authenticator``.
    :ivar problem: why users cannot sign in, as seen by the last call; None if they can.
    """

    def __init__(
        self, plugin: PluginRef, wrapped: BaseAuthenticator | None, problem: DispatcherError | None = None
    ) -> None:
        self.plugin = plugin
        self.name = plugin.name
        self.problem = problem
        self._wrapped = wrapped
        self._calls: dict[object, tuple[float, float]] = {}  # those in progress: when they began, their deadlines

    @property
    def verifies_passwords(self) -> bool:
        """Whether it verifies passwords; of one at fault it is assumed."""
        return self._wrapped is None or isinstance(self._wrapped, Authenticator)

    @property
    def changes_passwords(self) -> bool:
        """Whether users can change their passwords with it."""
        if not isinstance(self._wrapped, Authenticator):
            return False
        cls = type(self._wrapped)
        stated = cls.changes_passwords
        return stated if isinstance(stated, bool) else cls.set_password is not Authenticator.set_password

    @cached_property
    def refusal_time(self) -> float:
        """Seconds that each refusal takes at least, 0 if it is not known."""
        if not isinstance(self._wrapped, Authenticator):
            return 0.0
        try:
            with contained(self.plugin, "refusal_time"):
                found: object = plain(self._wrapped.refusal_time)
                if type(found) not in {int, float} or not 0 <= found <= MAX_REFUSAL:  # type: ignore[operator]
                    raise self._invalid("refusal_time", f"expected 0 to {MAX_REFUSAL:g} seconds")
                return float(found)  # type: ignore[arg-type]
        except DispatcherError:
            return 0.0

    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        """Return the user, with the name in canonical form; None for a wrong name or password.

        :raises Unavailable: it cannot be said now, whatever the reason.
        """
        with self._call("authenticate", (name, password), deadline) as wrapped:
            assert isinstance(wrapped, Authenticator)
            return self._identity("authenticate", wrapped.authenticate(name, password, deadline=deadline))

    @cached_property
    def title(self) -> str:
        """Name of the site that signs users in, "" for one that verifies passwords."""
        if not isinstance(self._wrapped, WebAuthenticator):
            return ""
        try:
            with contained(self.plugin, "title"):
                return self._text("title", "title", self._wrapped.title, MAX_TITLE)
        except DispatcherError:
            return self.name

    def begin(self, *, state: str, callback: str, deadline: Deadline) -> Redirect:
        """Begin a sign-in at the site.

        :raises Unavailable: that is not possible now, whatever the reason.
        """
        with self._call("begin", ("", state), deadline, proves=False) as wrapped:
            assert isinstance(wrapped, WebAuthenticator)
            found: object = wrapped.begin(state=state, callback=callback, deadline=deadline)
            if not isinstance(found, Redirect):
                raise self._invalid("begin", f"found a value of the type {type(found).__name__}")
            return Redirect(url=self._url("begin", found.url), kept=self._kept("begin", found.kept))

    def finish(
        self, parameters: Mapping[str, str], *, kept: str, callback: str, deadline: Deadline
    ) -> WebIdentity | None:
        """Return who signed in at the site, None if the site or the options refuse the user.

        :raises BadRequest: the site does not accept the answer: a new sign-in may succeed.
        :raises Unavailable: it cannot be said now, whatever the reason.
        """
        with self._call("finish", ("", parameters.get("code", "")), deadline) as wrapped:
            assert isinstance(wrapped, WebAuthenticator)
            try:
                found: object = wrapped.finish(parameters, kept=kept, callback=callback, deadline=deadline)
            except Forbidden as error:
                if type(error) is not Forbidden:
                    raise
                _log.info("the sign-in at the site is refused", authenticator=self.name, why=text(error))
                return None
            if found is None:
                return None
            user: object = plain(found.user) if isinstance(found, WebIdentity) else ""
            if not isinstance(found, WebIdentity) or not isinstance(user, str):
                raise self._invalid("finish", f"found a value of the type {type(found).__name__}")
            try:
                user_name(user)
            except BadRequest as error:  # of names that users choose themselves
                _log.info("a name that cannot exist", user=text(user, 255), authenticator=self.name, why=error.why)
                return None
            identity = self._identity("finish", found)
            assert identity is not None
            session = found.session
            return WebIdentity(
                user=identity.user,
                groups=identity.groups,
                subject=identity.subject,
                session=self._text("finish", "session", session, MAX_NAME) if session is not None else None,
                kept=self._kept("finish", found.kept),
            )

    def ended(self, token: str, *, deadline: Deadline) -> Ended | None:
        """Return which sessions ended at the site, None if the message is not authentic.

        :raises Unavailable: it cannot be verified now.
        """
        with self._call("ended", ("", token), deadline) as wrapped:
            assert isinstance(wrapped, WebAuthenticator)
            found: object = wrapped.ended(token, deadline=deadline)
            if found is None:
                return None
            if not isinstance(found, Ended) or (found.session is None and found.subject is None):
                raise self._invalid(
                    "ended", f"found a value of the type {type(found).__name__}, or without a session"
                )
            named = {
                name: self._text("ended", name, value, MAX_NAME) if value is not None else None
                for name, value in (("session", found.session), ("subject", found.subject))
            }
            return Ended(**named)

    def sign_out_url(self, *, kept: str, callback: str, deadline: Deadline) -> str | None:
        """Return the URL that ends the session at the site, too; None if there is none.

        :raises Unavailable: it is not known now.
        """
        with self._call("sign_out_url", ("", kept), deadline, proves=False) as wrapped:
            assert isinstance(wrapped, WebAuthenticator)
            found: object = wrapped.sign_out_url(kept=kept, callback=callback, deadline=deadline)
            return None if found is None else self._url("sign_out_url", found)

    def lookup(self, name: str, *, deadline: Deadline) -> Identity | None:
        """Return a user's entry in the directory; None if the account no longer exists.

        :raises Unsupported: it cannot look up users; :raises Unavailable: it does not answer.
        """
        wrapped = self._usable()
        found = bounded(
            self.plugin,
            "lookup",
            lambda: wrapped.lookup(name, deadline=deadline),
            seconds=deadline.remaining() + SLACK,
            log=None,
            error=Unavailable,
        )
        return self._identity("lookup", found)

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        """Change a password.

        :raises Unsupported: it is kept elsewhere; :raises BadRequest: it is refused, and so on;
        :raises Unavailable: it cannot be changed now.
        """
        with self._call("set_password", (name, password), deadline) as wrapped:
            assert isinstance(wrapped, Authenticator)
            wrapped.set_password(name, password, deadline=deadline)

    def check(self, *, deadline: Deadline) -> None:
        """Verify that passwords can be checked.

        :raises DispatcherError: what is wrong, for administrators.
        """
        wrapped = self._usable()
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

    def _usable(self) -> BaseAuthenticator:
        if self._wrapped is None:
            assert self.problem is not None
            raise self.problem.with_traceback(None)
        return self._wrapped

    @contextmanager
    def _call(
        self, method: str, secrets: tuple[str, str], deadline: Deadline, *, proves: bool = True
    ) -> Iterator[BaseAuthenticator]:
        """Contain a call.

        :param secrets: name and password, which errors must not show.
        :param proves: success means that users can sign in.
        """
        wrapped, job = self._wrapped, current_job()
        now, call = boottime(), object()
        slow = sum(began + SLOW < now < end + SLACK for began, end in list(self._calls.values()))
        if wrapped is None or (self.problem is not None and slow >= MAX_SLOW):
            raise unavailable(title=self.title)
        self._calls[call] = now, deadline.at
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
            if method == "finish" and type(error) is BadRequest:  # anybody can cause it
                _log.info("the answer of the site is refused", authenticator=self.name, why=": ".join(masked[:2]))
                raise BadRequest(f"{self.title} did not confirm the sign-in", fix="start again") from None
            problem = type(error)("")
            problem.what, problem.why, problem.fix = masked
            if self.problem is None or self.problem.what != problem.what:
                _log.error("the authenticator failed", plugin=str(self.plugin), call=method, why=str(problem))
            self.problem = problem
            raise unavailable(error.retry_after, self.title) from None
        finally:
            del self._calls[call]
        if proves:
            self.problem = None

    def _identity(self, method: str, found: object) -> Identity | None:
        """Return what a method returned, checked, with plain values."""
        if found is None:
            return None
        if inspect.iscoroutine(found):  # of a method that was declared with `async`
            found.close()
        if not isinstance(found, Identity):
            raise self._invalid(
                method, f"found a value of the type {type(found).__name__}, expected an Identity or None"
            )
        user = self._text(method, "user", found.user, MAX_USER)
        try:
            user = user_name(user)
        except BadRequest as error:
            raise self._invalid(method, f"user is {printable(text(user, 100))}: {error.why}") from None
        groups: object = found.groups
        if not isinstance(groups, (frozenset, set, tuple, list)) or len(groups) > MAX_GROUPS:
            raise self._invalid(method, f"groups is not a set of at most {MAX_GROUPS} names")
        return Identity(
            user=user,
            groups=frozenset(self._text(method, "groups", group, MAX_NAME) for group in groups),
            subject=self._text(method, "subject", found.subject, MAX_NAME) if found.subject is not None else None,
        )

    def _text(self, method: str, field: str, value: object, limit: int) -> str:
        found: object = plain(value)
        if not isinstance(found, str):
            raise self._invalid(method, f"{field} is of the type {type(found).__name__}, expected a text")
        if not found or len(found) > limit or (field != "user" and not found.isprintable()):
            raise self._invalid(
                method, f"{field} is {printable(text(found, 100))}: empty, too long or not printable"
            )
        return found

    def _kept(self, method: str, value: object) -> str:
        found: object = plain(value)
        if not isinstance(found, str) or len(found) > MAX_KEPT:
            raise self._invalid(method, f"kept is not a text of at most {MAX_KEPT} characters")
        return found

    def _url(self, method: str, value: object) -> str:
        found = self._text(method, "url", value, MAX_URL)
        try:
            good = urlsplit(found).scheme in {"https", "http"} and bool(urlsplit(found).hostname)
        except ValueError:
            good = False
        if not good or not found.isascii() or " " in found:
            raise self._invalid(method, f"url is {printable(found, 200)}")
        return found

    def _invalid(self, method: str, why: str) -> DispatcherError:
        what = f"The {self.plugin} returned an invalid value from {method}"
        return Unavailable(what, why=why, fix=self.plugin.report)


def unavailable(retry_after: float | None = None, title: str = "") -> Unavailable:
    """Return the error for an outage; strangers get no other.

    :param title: of the site that signs users in.
    """
    return Unavailable(
        f"Signing in with {title} is not possible at the moment"
        if title
        else "Passwords cannot be checked at the moment",
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
