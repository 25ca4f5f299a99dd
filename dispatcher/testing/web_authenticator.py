"""The contract of authenticators with a site: subclass `WebAuthenticatorContract`, sign people in, run pytest.

    class TestMine(WebAuthenticatorContract):
        people = ("alice", "bob")

        def sign_in(self, url, name):
            return the_parameters_with_which_the_site_sends_the_browser_back

`docs/reference/conformance-kit.md` describes all checks.  Needs pytest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn
from urllib.parse import unquote, urlsplit

import pytest

from dispatcher.plugin import names
from dispatcher.plugin.authenticator import Redirect, WebAuthenticator, WebIdentity
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import BadRequest, Forbidden, PluginError, Unavailable
from dispatcher.testing.authenticator.asker import Answer, in_time
from dispatcher.testing.authenticator.declaration import load
from dispatcher.testing.base import needs_no
from dispatcher.testing.declared import expect_signatures
from dispatcher.testing.driver import expect

STATE = "kit-state-" + "s" * 33
CALLBACK = "http://127.0.0.1:9/auth/callback/kit"
MAX_KEPT, MAX_TEXT, MAX_TITLE = 16384, 255, 64  # characters
_JUNK = "kit-junk"
_ADVICE = "by deadline.remaining(), and raise Unavailable when it is over"


@dataclass(frozen=True)
class Begun:
    """A sign-in that has begun.  `parameters` are those of the answer."""

    redirect: Redirect
    parameters: Mapping[str, str]


class WebAuthenticatorContract:
    """What an authenticator with a site must do.

    Must be overridden: the fixture `authenticator`, `people`, `sign_in`, `outsider` (or `no_outsider`) and
    `broken_site` (or `no_site`).
    """

    #: People who may sign in: at least two.
    people: ClassVar[tuple[str, ...]] = ()
    #: A user of the site who may not sign in.
    outsider: ClassVar[str] = ""
    #: Why there is no such person; empty if there is one.
    no_outsider: ClassVar[str] = ""
    #: Why no site can be down; empty if one can.
    no_site: ClassVar[str] = ""
    #: The address at which `sign_in` expects the browser to come back.
    callback: ClassVar[str] = CALLBACK
    #: Maximum seconds of one call.
    patience: ClassVar[float] = 10.0
    #: Seconds that a call may take past its deadline.
    slack: ClassVar[float] = 1.0
    #: Seconds that calls to a silent site get.
    silent_seconds: ClassVar[float] = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave out the checks for which the class states that there is nothing."""
        super().__init_subclass__(**kwargs)
        for name in dir(cls):
            setting = getattr(getattr(cls, name), "left_out_by", "")
            if setting and getattr(cls, setting):
                setattr(cls, name, None)

    # -- for the author ----------------------------------------------------------------------------------

    @pytest.fixture
    def authenticator(self) -> WebAuthenticator:
        """Return the authenticator under test, made with options.  Must be overridden."""
        self._must("the fixture authenticator(self)")

    def sign_in(self, url: str, name: str) -> Mapping[str, str]:
        """Sign a person in at the site, in a new browser; return the parameters of its answer.

        Must be overridden.

        :param url: of the `Redirect`.
        """
        self._must(f"sign_in({url!r}, {name!r})")

    def broken_site(self, how: str) -> AbstractContextManager[None]:
        """Return a context in which the site is "down" or "silent".  Must be overridden without `no_site`."""
        self._must(f"broken_site({how!r}), or set no_site to the reason why there is none")

    def _must(self, what: str) -> NoReturn:
        pytest.fail(f"{type(self).__name__} must override {what}; see docs/reference/conformance-kit.md")

    # -- declaration -------------------------------------------------------------------------------------

    def test_class_is_accepted_by_the_loader(self, authenticator: WebAuthenticator) -> None:
        """The plugin loader accepts the class: name, version of the contract, options, nothing abstract."""
        try:
            load(type(authenticator))
        except PluginError as error:
            pytest.fail(f"the plugin loader refuses {type(authenticator).__name__}: {error}")

    def test_signatures_are_the_contract(self, authenticator: WebAuthenticator) -> None:
        """Every method takes the contract's arguments under the contract's names, and none is a coroutine."""
        expect_signatures(type(authenticator), WebAuthenticator)

    def test_title_can_be_shown(self, authenticator: WebAuthenticator) -> None:
        """The title is a printable text of at most 64 characters, and is known without the site."""
        title: object = authenticator.title
        expect(
            isinstance(title, str) and 0 < len(title) <= MAX_TITLE and title.isprintable(),
            f'title is {title!r}: the sign-in page shows "Sign in with TITLE"',
        )

    # -- signing in --------------------------------------------------------------------------------------

    def test_begin_leads_to_the_site_with_state_and_callback(self, authenticator: WebAuthenticator) -> None:
        """The URL of `begin` is a web address, and names the state and the callback."""
        redirect = self._begin(authenticator)
        parts = urlsplit(redirect.url)
        expect(
            parts.scheme in {"https", "http"} and parts.hostname and redirect.url.isascii(),
            f"begin() leads to {redirect.url!r}, which is no web address",
        )
        expect(STATE in redirect.url, f"begin() leads to {redirect.url!r}, without the state")
        expect(self.callback in unquote(redirect.url), f"begin() leads to {redirect.url!r}, without the callback")
        expect(
            isinstance(redirect.kept, str) and len(redirect.kept) <= MAX_KEPT,
            f"begin() keeps more than {MAX_KEPT} characters",
        )

    def test_people_sign_in_each_with_a_subject_of_their_own(self, authenticator: WebAuthenticator) -> None:
        """A person signs in twice and has the same subject; another one has another."""
        alice, again, bob = (self._signed_in(authenticator, self._person(which)) for which in (0, 0, 1))
        for identity in (alice, bob):
            try:
                names.user_name(identity.user)
            except BadRequest as error:
                pytest.fail(f"finish() found the user {identity.user!r}: {error.why}")
            for field in ("subject", "session"):
                value = getattr(identity, field)
                expect(
                    value is None or (isinstance(value, str) and 0 < len(value) <= MAX_TEXT),
                    f"{field} is {value!r}",
                )
            expect(len(identity.kept) <= MAX_KEPT, f"finish() keeps more than {MAX_KEPT} characters")
        expect(alice.user == again.user and alice.subject == again.subject, "the same person gets another subject")
        expect(alice.user != bob.user, "two people get one name")
        expect(
            alice.subject is None or alice.subject != bob.subject,
            "two people get one subject: it must identify the account, also when its name is another's",
        )

    @needs_no("no_outsider")
    def test_outsider_is_refused(self, authenticator: WebAuthenticator) -> None:
        """Somebody who may not sign in here is refused: None, or `Forbidden` with the reason."""
        answer = self._finish(authenticator, self._begun(authenticator, self.outsider))
        expect(
            (answer.error is None and answer.value is None) or type(answer.error) is Forbidden,
            f"finish() {answer} for the outsider: return None, or raise Forbidden",
        )

    def test_an_answer_is_used_once(self, authenticator: WebAuthenticator) -> None:
        """An answer is refused the second time."""
        begun = self._begun(authenticator, self._person(0))
        self._identity(self._finish(authenticator, begun))
        self._refused(self._finish(authenticator, begun), "an answer for the second time")

    def test_the_answer_to_another_sign_in_is_refused(self, authenticator: WebAuthenticator) -> None:
        """What the site has answered to another sign-in is refused: a stolen answer signs nobody in."""
        mine, other = (self._begun(authenticator, self._person(which)) for which in (0, 1))
        mixed = Begun(mine.redirect, other.parameters)
        self._refused(self._finish(authenticator, mixed), "the answer to another sign-in")

    def test_changed_parameters_sign_in_nobody_else(self, authenticator: WebAuthenticator) -> None:
        """Each parameter missing or replaced: refused without an outage, or without effect."""
        whole = self._begun(authenticator, self._person(0))
        wanted = self._identity(self._finish(authenticator, whole)).user
        given = set(whole.parameters)
        changes: list[tuple[set[str], str | None]] = [(given, None)]
        changes += [({name}, value) for name in sorted(given) for value in (None, _JUNK)]
        for changed, value in changes:
            begun = self._begun(authenticator, self._person(0))
            kept = {name: text for name, text in begun.parameters.items() if name not in changed}
            parameters = kept | (dict.fromkeys(changed, value) if value is not None else {})
            answer = self._finish(authenticator, Begun(begun.redirect, parameters))
            if isinstance(answer.value, WebIdentity):
                expect(answer.value.user == wanted, f"finish() {answer} for the parameters {parameters}")
            else:
                self._refused(answer, f"the parameters {parameters}")

    # -- signing out -------------------------------------------------------------------------------------

    def test_a_message_of_a_stranger_ends_nothing(self, authenticator: WebAuthenticator) -> None:
        """`ended` returns None for a message that is not authentic."""
        for token in (_JUNK, "", "a.b.c", "\x00é", "x" * 30_000):
            answer = self._call(authenticator, "ended", token)
            expect(
                answer.error is None and answer.value is None, f"ended() {answer} for {token[:20]!r}: return None"
            )

    def test_sign_out_leads_to_a_web_address(self, authenticator: WebAuthenticator) -> None:
        """`sign_out_url` returns None or a web address, also without what `finish` kept."""
        for kept in (self._signed_in(authenticator, self._person(0)).kept, ""):
            answer = self._call(authenticator, "sign_out_url", kept=kept, callback=self.callback)
            expect(
                answer.error is None
                and (answer.value is None or urlsplit(str(answer.value)).scheme in {"https", "http"}),
                f"sign_out_url() {answer}: return a web address, or None",
            )

    # -- faults ------------------------------------------------------------------------------------------

    @needs_no("no_site")
    def test_site_down_is_unavailable(self, authenticator: WebAuthenticator) -> None:
        """`finish` without the site raises `Unavailable` with a reason; afterwards the same instance works."""
        begun = self._begun(authenticator, self._person(0))
        with self.broken_site("down"):
            self._unavailable(self._finish(authenticator, begun), "with the site down")
        self._signed_in(authenticator, self._person(0))

    @needs_no("no_site")
    def test_silent_site_meets_the_deadline(self, authenticator: WebAuthenticator) -> None:
        """`finish` with a site that does not answer raises `Unavailable` in time."""
        begun = self._begun(authenticator, self._person(0))
        with self.broken_site("silent"):
            answer = self._finish(authenticator, begun, seconds=self.silent_seconds)
            self._unavailable(answer, "with a silent site")

    # -- helpers -----------------------------------------------------------------------------------------

    def _person(self, which: int) -> str:
        if len(self.people) < 2:
            self._must("people: at least two")
        return self.people[which]

    def _call(
        self, authenticator: WebAuthenticator, method: str, *arguments: Any, seconds: float = 0, **more: Any
    ) -> Answer:
        __tracebackhide__ = True
        allowed = seconds or self.patience

        def run() -> object:
            return getattr(authenticator, method)(*arguments, **more, deadline=Deadline(allowed))

        return in_time(f"{method}()", run, allowed, self.slack, _ADVICE)

    def _begin(self, authenticator: WebAuthenticator) -> Redirect:
        __tracebackhide__ = True
        answer = self._call(authenticator, "begin", state=STATE, callback=self.callback)
        if not isinstance(answer.value, Redirect):
            pytest.fail(f"begin() {answer}: return a Redirect")
        return answer.value

    def _begun(self, authenticator: WebAuthenticator, name: str) -> Begun:
        __tracebackhide__ = True
        redirect = self._begin(authenticator)
        return Begun(redirect, self.sign_in(redirect.url, name))

    def _finish(self, authenticator: WebAuthenticator, begun: Begun, *, seconds: float = 0) -> Answer:
        __tracebackhide__ = True
        kept = begun.redirect.kept
        parameters = dict(begun.parameters)
        return self._call(authenticator, "finish", parameters, kept=kept, callback=self.callback, seconds=seconds)

    def _signed_in(self, authenticator: WebAuthenticator, name: str) -> WebIdentity:
        __tracebackhide__ = True
        return self._identity(self._finish(authenticator, self._begun(authenticator, name)))

    @staticmethod
    def _identity(answer: Answer) -> WebIdentity:
        __tracebackhide__ = True
        if not isinstance(answer.value, WebIdentity):
            pytest.fail(f"finish() {answer} for somebody who may sign in: return a WebIdentity")
        return answer.value

    @staticmethod
    def _refused(answer: Answer, what: str) -> None:
        __tracebackhide__ = True
        expect(
            (answer.error is None and answer.value is None) or type(answer.error) in {BadRequest, Forbidden},
            f"finish() {answer} for {what}: raise BadRequest.  Anybody can cause it, so it is no outage",
        )

    @staticmethod
    def _unavailable(answer: Answer, when: str) -> None:
        __tracebackhide__ = True
        if not isinstance(answer.error, Unavailable):
            pytest.fail(f"finish() {answer} {when}: raise Unavailable")
        expect(answer.error.why or answer.error.fix, f"finish() raised Unavailable without words {when}")
