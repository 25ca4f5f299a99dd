"""Signing in at other sites: pending sign-ins, their answers, and the ends of sessions there.

A sign-in begins here with a random *state*, which only the site and the browser get.  It is tied to the browser by
a nonce in a cookie, so that nobody can sign another person in as somebody else; it is valid once, for ten minutes,
in memory only.  Secrets and tokens of the site never leave the manager.
"""

from __future__ import annotations

import hmac
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from dispatcher.common.log import logger
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator, unavailable
from dispatcher.manager.auth.hashing import HashPool
from dispatcher.manager.auth.sessions import Sessions, digest, new_token
from dispatcher.manager.auth.signin import SignedIn, SignIn
from dispatcher.manager.auth.throttle import Throttled, address_key
from dispatcher.manager.metrics import LoginOutcome, Metrics
from dispatcher.manager.storage.auth import AuthStore, External, Visitor
from dispatcher.plugin.authenticator import Ended, WebIdentity
from dispatcher.plugin.deadline import Deadline, SteadyWallClock
from dispatcher.plugin.errors import BadRequest, DispatcherError, Forbidden, NotFound, TooManyRequests, Unavailable

LIFETIME = 600.0  # seconds of a pending sign-in
MAX_PENDING = 10_000
MAX_OF_ADDRESS = 2_000
TIMEOUT = 25.0  # seconds for a sign-in, waiting included
CALL_TIMEOUT = 15.0  # seconds of these for the authenticator
SIGN_OUT_TIMEOUT = 5.0  # seconds

_T = TypeVar("_T")
_log = logger("manager.signin")


@dataclass(frozen=True, slots=True)
class Pending:
    """A sign-in that has begun.

    :ivar target: where the browser goes in the end; :ivar kept: of the authenticator.
    """

    authenticator: str
    callback: str
    nonce_sha256: str
    address: str
    target: str
    until: float
    kept: str = field(repr=False)


class PendingSignIns:
    """Pending sign-ins by the SHA-256 of their state; bounded: the oldest of the busiest address goes first."""

    def __init__(self, limit: int = MAX_PENDING, of_address: int = MAX_OF_ADDRESS) -> None:
        self._pending: dict[str, Pending] = {}  # the oldest first
        self._addresses: Counter[str] = Counter()
        self._limit = limit
        self._of_address = of_address
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, state: str, pending: Pending, now: float) -> None:
        """Keep a sign-in."""
        with self._lock:
            while self._pending and next(iter(self._pending.values())).until <= now:
                self._drop(next(iter(self._pending)))
            if self._addresses[pending.address] >= self._of_address:
                self._drop_oldest(pending.address)
            elif len(self._pending) >= self._limit:
                self._drop_oldest(self._addresses.most_common(1)[0][0])
            self._pending[digest(state)] = pending
            self._addresses[pending.address] += 1

    def take(self, state: str, authenticator: str, nonce: str, now: float) -> Pending:
        """Return a sign-in and forget it.

        :raises Forbidden: unknown, used, expired, of another authenticator or another browser: the same error.
        """
        with self._lock:
            found = self._pending.get(digest(state))
            if (
                found is None
                or found.until <= now
                or found.authenticator != authenticator
                or not hmac.compare_digest(found.nonce_sha256, digest(nonce))
            ):
                raise Forbidden(
                    "This sign-in is not valid any more",
                    why="it was used before, began more than ten minutes ago, or in another browser",
                    fix="start again",
                )
            self._drop(digest(state))
            return found

    def _drop_oldest(self, address: str) -> None:
        self._drop(next(key for key, each in self._pending.items() if each.address == address))

    def _drop(self, key: str) -> None:
        address = self._pending.pop(key).address
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]


class WebSignIn:
    """All operations with authenticators that send the browser to another site.

    :param pool: for their calls, apart from checks of passwords.
    :param base: returns the portal's URL without a slash at the end, "" if it is not known.
    """

    def __init__(
        self,
        *,
        signin: SignIn,
        sessions: Sessions,
        store: AuthStore,
        supervisor: Supervisor,
        pool: HashPool,
        clock: SteadyWallClock,
        metrics: Metrics,
        base: Callable[[], str],
    ) -> None:
        self._signin = signin
        self._sessions = sessions
        self._store = store
        self._supervisor = supervisor
        self._pool = pool
        self._clock = clock
        self._metrics = metrics
        self._base = base
        self.pending = PendingSignIns()

    def sites(self) -> list[ContainedAuthenticator]:
        """Return the authenticators with a site."""
        return [entry for entry in self._signin.authenticators if entry.title]

    def check_overdue(self) -> None:
        """Give up calls that hang; called regularly."""
        self._pool.check_overdue()

    def callback(self, name: str) -> str:
        """Return the URL to which a site sends the browser back.

        :raises Unavailable: `proxy.public_url` is missing.
        """
        return f"{self._known_base()}/callback/{name}"

    def begin(self, name: str, nonce_sha256: str, address: str, target: str) -> str:
        """Begin a sign-in; return the URL of the site.

        :param nonce_sha256: of the browser's cookie; :param target: where it goes in the end.
        :raises NotFound: there is no such site; :raises TooManyRequests: too many attempts from this address.
        :raises Unavailable: the site does not answer.
        """
        entry, callback, key = self._entry(name), self.callback(name), address_key(address)
        self._signin.throttle.refuse([key], self._clock.now())
        state = new_token()
        found = self._call(
            entry, key, lambda deadline: entry.begin(state=state, callback=callback, deadline=deadline)
        )
        now = self._clock.now()
        pending = Pending(name, callback, nonce_sha256, key, target, now + LIFETIME, found.kept)
        self.pending.add(state, pending, now)
        return found.url

    def finish(
        self, name: str, parameters: Mapping[str, str], nonce: str, visitor: Visitor, device: str | None
    ) -> tuple[SignedIn, str]:
        """Finish a sign-in: verify the answer of the site and make a session.

        :param nonce: the browser's cookie; :param device: token of an earlier sign-in with this browser.
        :return: the session, and where the browser goes.
        :raises Forbidden: the sign-in is not this browser's, or the user may not sign in.
        :raises BadRequest: the site does not accept the answer; :raises Unavailable: the site does not answer.
        :raises TooManyRequests: too many attempts, or too many at once: the sign-in is still pending.
        """
        entry, key = self._entry(name), address_key(visitor.address)
        taken: list[Pending] = []

        def work(deadline: Deadline) -> WebIdentity | None:
            with self._counted(key):
                now = self._clock.now()
                pending = self.pending.take(parameters.get("state", ""), name, nonce, now)
                taken.append(pending)
                return entry.finish(parameters, kept=pending.kept, callback=pending.callback, deadline=deadline)

        try:
            identity = self._call(entry, key, work)
            if identity is None:
                _log.info("not signed in by the site", authenticator=name, address=visitor.address)
                raise Forbidden(
                    f"{entry.title} did not sign you in", why="you may not sign in here, or have declined"
                )
        except DispatcherError as error:
            self._metrics.login(
                LoginOutcome.THROTTLED if isinstance(error, Throttled)
                else LoginOutcome.BUSY if isinstance(error, TooManyRequests)
                else LoginOutcome.UNAVAILABLE if isinstance(error, Unavailable)
                else LoginOutcome.FAILURE
            )  # fmt: skip
            if taken:
                error.details = {"next": taken[0].target}
            raise
        standing = self._sessions.standing(identity.user)
        external = External(source=name, external=identity.session, kept=identity.kept or None)
        return (
            self._signin.enter(name, identity, visitor, device, standing=standing, external=external),
            taken[0].target,
        )

    def ended(self, name: str, token: str, address: str) -> int:
        """End the sessions that ended at the site, as it says; return how many.

        :raises BadRequest: the message is not authentic; :raises Unavailable: it cannot be verified now.
        """
        entry, key = self._entry(name), address_key(address)

        def work(deadline: Deadline) -> Ended:
            with self._counted(key):
                found = entry.ended(token, deadline=deadline)
                if found is None:
                    raise BadRequest(
                        "The logout token is not valid", fix="see docs/howto/sign-in-with-openid-connect.md"
                    )
                return found

        found = self._call(entry, key, work)
        subject = found.subject
        users = [] if subject is None else self._supervisor.store.users_of(name, subject)
        if found.session is not None:
            keys = self._store.sessions_from(name, found.session, [user.id for user in users])
            for each in keys:
                self._sessions.revoke(each)
            count = len(keys)
        else:
            count = sum(self._sessions.revoke_user(user.name) for user in users)
        _log.info("sessions ended at the site", authenticator=name, sessions=count)
        return count

    def sign_out(self, sha256: str) -> str | None:
        """End a session; return the URL at which the browser ends it at the site, too."""
        row = self._sessions.get(sha256)
        own = row.parent or row.sha256 if row else sha256
        external = self._store.external(own) if row else External()
        self._sessions.revoke(own)
        if external.source is None:
            return None
        with suppress(DispatcherError):  # the session here has ended in any case; the log has the reason
            entry, callback = self._entry(external.source), f"{self._known_base()}/signed-out"
            kept = external.kept or ""
            return self._call(
                entry,
                "",
                lambda deadline: entry.sign_out_url(kept=kept, callback=callback, deadline=deadline),
                SIGN_OUT_TIMEOUT,
            )
        return None

    def _entry(self, name: str) -> ContainedAuthenticator:
        entry = self._signin.authenticators.get(name)
        if not entry.title:
            raise NotFound(f"The authenticator {name} has no site", fix="sign in with name and password")
        return entry

    def _known_base(self) -> str:
        base = self._base()
        if not base:
            raise Unavailable(
                "Signing in at another site is not possible", why="proxy.public_url is not set", fix="set it"
            )
        return base

    def _call(
        self, entry: ContainedAuthenticator, key: str, work: Callable[[Deadline], _T], seconds: float | None = None
    ) -> _T:
        """Return what `work` returns, run in the pool."""
        deadline = Deadline(seconds or TIMEOUT)
        allowed = deadline.bounded(CALL_TIMEOUT)
        try:
            return self._pool.run(lambda: work(allowed), deadline, [key] if key else [], entry.hung)
        except Unavailable as error:
            raise unavailable(error.retry_after, entry.title) from None

    @contextmanager
    def _counted(self, key: str) -> Iterator[None]:
        """Count an attempt from an address; what the site does not accept counts like a wrong password.

        :raises Throttled: there were too many.
        """
        throttle, now = self._signin.throttle, self._clock.now()
        throttle.admit([key], now)
        try:
            yield
        except BadRequest:
            self._signin.keep(throttle.failed([key], now))
            raise
        except BaseException:
            throttle.released([key])
            raise
        throttle.released([key])
