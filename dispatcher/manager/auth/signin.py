"""Signing in: throttle, authenticator, session, and the start of the user's agent.

An attacker must not learn whether a name exists: unknown and known names are counted, delayed and refused in the
same way.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass

from dispatcher.common.log import logger
from dispatcher.manager.agents.agent import AgentView, default_agent
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.manager.auth import local
from dispatcher.manager.auth.authenticators import Authenticators, ask_for_password, is_same_account, source_of
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator
from dispatcher.manager.auth.hashing import Hasher, HashPool, check_length
from dispatcher.manager.auth.sessions import Sessions, Standing, digest, new_token
from dispatcher.manager.auth.throttle import Throttle, Throttled, address_key
from dispatcher.manager.metrics import LoginOutcome, Metrics
from dispatcher.manager.storage.auth import AuthStore, Changes, External, SessionRow, Visitor
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin import names
from dispatcher.plugin.authenticator import Identity
from dispatcher.plugin.deadline import Deadline, SteadyWallClock, boottime
from dispatcher.plugin.errors import (
    BadRequest,
    Conflict,
    DispatcherError,
    Forbidden,
    NotFound,
    TooManyRequests,
    Unsupported,
)

TIMEOUT = 30.0  # seconds for a check of a password, waiting included
STEP = 0.5  # seconds: refusals by one of several authenticators come after a multiple of it
CALL_TIMEOUT = 20.0  # seconds of these for the authenticator: its error is there before the wait ends

_log = logger("manager.signin")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """The result of a sign-in: tokens for two cookies, and the session."""

    token: str
    device: str
    session: SessionRow


class _Attempt:
    """An attempt in the throttle's accounts: it ends once, when it returns or when it is given up."""

    def __init__(self, throttle: Throttle, keys: list[str]) -> None:
        self.keys = keys
        self._throttle = throttle
        self._asked: ContainedAuthenticator | None = None
        self._counts = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """The throttle has admitted it."""
        self._counts = True

    def end(self) -> bool:
        """End it; return whether it had not ended yet."""
        with self._lock:
            counts, self._counts = self._counts, False
            return counts

    def release(self) -> None:
        """End it without a result."""
        if self.end():
            self._throttle.released(self.keys)

    def give_up(self, error: DispatcherError) -> None:
        """End it, as its call hangs."""
        self.release()
        if self._asked is not None:
            self._asked.hung(error)

    def asking(self, authenticator: ContainedAuthenticator) -> None:
        """An authenticator is called now."""
        self._asked = authenticator


class SignIn:
    """All operations with passwords."""

    def __init__(
        self,
        *,
        authenticators: Authenticators,
        supervisor: Supervisor,
        sessions: Sessions,
        store: AuthStore,
        pool: HashPool,
        hasher: Hasher,
        clock: SteadyWallClock,
        metrics: Metrics,
    ) -> None:
        self.authenticators = authenticators
        self._supervisor = supervisor
        self._sessions = sessions
        self._store = store
        self._pool = pool
        self._hasher = hasher
        self._clock = clock
        self._metrics = metrics
        self.throttle = Throttle(store.accounts())

    def check_overdue(self) -> None:
        """Give up checks of passwords that hang; called regularly."""
        self._pool.check_overdue()

    def sign_in(
        self, raw_name: str, password: str, visitor: Visitor, device: str | None, stdin_apps: frozenset[str]
    ) -> SignedIn:
        """Check a password, start the user's agent and make a session.

        :param device: token of an earlier sign-in with this browser.
        :param stdin_apps: apps that take the credentials on standard input.
        :raises Forbidden: wrong password, unknown name, or a user without an agent: the same error.
        :raises TooManyRequests: too many attempts, or too many at once.
        :raises Unavailable: the authenticator's backend does not answer.
        """
        name = self._name(raw_name)
        standing = self._sessions.standing(name)
        source, identity = self._verify(name, password, visitor.address, device)
        if identity.user != name:  # the directory's spelling
            standing = self._sessions.standing(identity.user)
        return self.enter(
            source, identity, visitor, device, standing=standing, password=password, stdin_apps=stdin_apps
        )

    def enter(
        self,
        source: str,
        identity: Identity,
        visitor: Visitor,
        device: str | None,
        *,
        standing: Standing,
        external: External | None = None,
        password: str | None = None,
        stdin_apps: frozenset[str] = frozenset(),
    ) -> SignedIn:
        """Make a session of a verified user, and start the agent.

        :param source: the authenticator; :param identity: its user, in canonical form.
        :param standing: from before the user was verified; :param external: the session at another site.
        :param password: for apps that take the credentials on standard input (`stdin_apps`).
        :raises Forbidden: the name belongs to another account, or the user has no agent and gets none.
        """
        user = identity.user
        groups = None if source == local.NAME else identity.groups
        if external is not None:
            self._check_name(source, identity)
        if groups is not None and standing.user_id is not None:
            self._bind(source, identity)
        agent = self._default_agent(user, groups)
        if groups is not None and standing.user_id is None:
            self._bind(source, identity)
        if standing.user_id is None:  # new: of an external authenticator
            standing = self._sessions.standing(user)
        self._start(agent, user, password, stdin_apps)
        known = device and standing.user_id and self._store.has_device(digest(device), standing.user_id)
        kept = device if device and known else new_token()
        token, row = self._sessions.create(
            user, agent.name, visitor, standing=standing, device=digest(kept), external=external
        )
        self._metrics.login(LoginOutcome.SUCCESS)
        _log.info("signed in", user=user, address=visitor.address, session=row.sha256[:8], authenticator=source)
        return SignedIn(token=token, device=kept, session=row)

    def _check_name(self, source: str, identity: Identity) -> None:
        """Check that an account of a site has no other name here.

        Users can change their names at some sites: with each they would have further agents.

        :raises Forbidden: it has.
        """
        known = self._supervisor.store.users_of(source, identity.subject) if identity.subject is not None else []
        others = [row.name for row in known if row.departed is None]
        if others and identity.user not in others:
            why = f"it is known as {others[0]}, until: dispatcher auth release {others[0]}"
            _log.warning("an account has another name now", user=identity.user, authenticator=source, why=why)
            self._metrics.login(LoginOutcome.FAILURE)
            raise Forbidden(f"Your account is known here as {others[0]}", fix="ask your administrator")

    def _bind(self, source: str, identity: Identity) -> None:
        """Store that a name belongs to this account, and its groups.

        :raises Forbidden: it belongs to another one.
        """
        row = self._supervisor.store.get_user(identity.user)
        groups = tuple(sorted(identity.groups))
        same = (source, identity.subject or (row and row.subject), groups, None)
        if row and (row.source, row.subject, row.groups, row.departed) == same:
            return
        if not self._supervisor.store.bind_user(identity.user, source, identity.subject, groups):
            known = source_of(row)
            why = "another account had the name before" if known == source else f"it is known from {known}"
            _log.warning("a name belongs to another account", user=identity.user, authenticator=source, why=why)
            self._metrics.login(LoginOutcome.FAILURE)
            raise Forbidden(f"The name {identity.user} belongs to another account", fix="ask your administrator")
        self._supervisor.access.set_groups(identity.user, groups)

    def check(self, name: str, password: str, address: str | None, device: str | None = None) -> str:
        """Check the password of a known user, count the attempt, and return the name.

        :param name: canonical; :param address: of the browser, None for a check by an administrator.
        :raises Forbidden: it is wrong; :raises TooManyRequests: as `sign_in`.
        """
        source, identity = self._verify(name, password, address, device)
        row = self._supervisor.store.get_user(name)
        if row is None or source_of(row) not in {None, source} or not is_same_account(row, identity):
            _log.warning("the password is another account's", user=name, authenticator=source)
            raise wrong_credentials()
        return name

    def _verify(self, name: str, password: str, address: str | None, device: str | None) -> tuple[str, Identity]:
        keys = [f"name:{name}", *([address_key(address)] if address is not None else [])]
        user_id = self._sessions.user_id(name)
        if device and user_id and self._store.knows_device(digest(device), user_id, self._clock.now()):
            keys = [f"device:{digest(device)}"]
        deadline = Deadline(TIMEOUT)
        try:
            self.throttle.refuse(keys, self._clock.now())
            attempt = _Attempt(self.throttle, keys)
            found = self._pool.run(
                lambda: self._attempt(attempt, name, password, deadline), deadline, keys, attempt.give_up
            )
        except DispatcherError as error:
            self._metrics.login(
                LoginOutcome.THROTTLED if isinstance(error, Throttled)
                else LoginOutcome.BUSY if isinstance(error, TooManyRequests)
                else LoginOutcome.UNAVAILABLE
            )  # fmt: skip
            raise
        if found is None:
            self._metrics.login(LoginOutcome.FAILURE)
            _log.info("wrong name or password", user=name, address=address)
            raise wrong_credentials()
        return found

    def _attempt(
        self, attempt: _Attempt, name: str, password: str, deadline: Deadline
    ) -> tuple[str, Identity] | None:
        """Check a password and count the attempt.  Runs in the pool, few at a time, so most of a burst is late."""
        now, keys = self._clock.now(), attempt.keys
        self.throttle.admit(keys, now)
        attempt.begin()
        began = boottime()
        try:
            found = self.authenticators.authenticate(
                self._supervisor.store.get_user(name),
                name,
                password,
                deadline.bounded(CALL_TIMEOUT),
                attempt.asking,
            )
        except BaseException:
            attempt.release()
            raise
        if attempt.end():
            self.keep(self.throttle.succeeded(keys, now) if found else self.throttle.failed(keys, now))
        if found is None and self.authenticators.several:  # the time would show which of them knows the name
            passed = boottime() - began
            least = max(passed, self.authenticators.refusal_time)
            time.sleep(min((least // STEP + 1) * STEP - passed, deadline.remaining()))
        return found

    def preview(self, raw_name: str, password: str | None, only: str | None) -> tuple[str, Identity] | None:
        """Return what a sign-in with this name would find, None for a refusal; nothing is counted or stored.

        :param password: None: the directory is asked without one; :param only: of `authenticators`; by default
            those that a sign-in asks.
        :raises Unsupported: a password is needed; :raises Unavailable: the directory does not answer.
        """
        name = names.user_name(raw_name.strip())
        row = self._supervisor.store.get_user(name)
        asked = [self.authenticators.get(only)] if only is not None else self.authenticators.of(row)
        deadline = Deadline(CALL_TIMEOUT)

        def verify() -> tuple[str, Identity] | None:
            return ask_for_password(asked, name, password or "", deadline)

        if password is not None:
            return self._pool.run(verify, deadline)
        for entry in asked:
            if (identity := entry.lookup(name, deadline=deadline)) is not None:
                return entry.name, identity
        return None

    def hash_new(self, password: str) -> str:
        """Return the hash of a new user's password.

        :raises BadRequest: too short, too long; or the manager does not store passwords.
        """
        if self.authenticators.local is None:
            known = ", ".join(entry.name for entry in self.authenticators)
            raise BadRequest(
                "A password was given", why=f"users sign in with the authenticator {known}", fix="leave it out"
            )
        check_length(password)
        deadline = Deadline(TIMEOUT)
        return self._pool.run(lambda: self._hasher.hash(password), deadline)

    def set_password(self, user: str, password: str) -> None:
        """Change a password.  The caller ends the sessions.

        :raises BadRequest: too short or too long; :raises Unsupported: it is kept elsewhere.
        """
        check_length(password)
        deadline = Deadline(TIMEOUT)
        keeper = self._keeper(user)
        if keeper is None:
            raise Unsupported(f"{user} has no password here", fix="change it where the user signs in")

        def change() -> None:
            keeper.set_password(user, password, deadline=deadline.bounded(CALL_TIMEOUT))

        if user_id := self._sessions.user_id(user):
            # Otherwise each known browser would have free attempts at the new password.
            self._store.distrust_devices(user_id)
        self._pool.run(change, deadline, overdue=keeper.hung)
        self.keep(self.throttle.forget(f"name:{user}"))
        _log.info("password changed", user=user)

    def changes_passwords(self, user: str) -> bool:
        """Whether a user can change the password here."""
        keeper = self._keeper(user)
        return keeper is not None and keeper.changes_passwords

    def has_password(self, user: str) -> bool:
        """Whether a user has a password that can be checked; others sign in at another site."""
        return self._keeper(user) is not None

    def _keeper(self, user: str) -> ContainedAuthenticator | None:
        """Return the authenticator that has a user's password."""
        row = self._supervisor.store.get_user(user)
        if source_of(row) is None and self.authenticators.local:
            return self.authenticators.local  # a password makes it a local user
        return next((entry for entry in self.authenticators.of(row) if entry.verifies_passwords), None)

    def _name(self, raw: str) -> str:
        """Return the canonical name without blanks around it; an invalid one is refused like a wrong password."""
        try:
            return names.user_name(raw.strip())
        except BadRequest as error:
            self._metrics.login(LoginOutcome.FAILURE)
            _log.info("a name that cannot exist", user=raw, why=error.why)
            raise wrong_credentials() from None

    def _default_agent(self, user: str, groups: frozenset[str] | None) -> AgentView:
        """Return the agent of a sign-in; an external authenticator's user gets one.

        :param groups: that an external authenticator named; None for `local`.
        """
        access = self._supervisor.access
        views = self._supervisor.queries.views
        known = views(user=user)
        agent = default_agent(user, [view for view in known if access.may_use(user, view.app)])
        if agent is None and groups is not None and (app := access.first_app(user, groups)) is not None:
            with contextlib.suppress(Conflict):
                self._supervisor.commands.create(user, app=app, password_hash=None)
            agent = default_agent(user, [view for view in views(user=user) if view.app == app])
        if agent is None:
            self._metrics.login(LoginOutcome.FAILURE)
            if groups is None and default_agent(user, known) is None:
                raise wrong_credentials()
            _log.warning(
                "a user may use no app",
                user=user,
                groups=sorted(groups or ()),
                fix="see [groups] in the configuration, and which groups the authenticator names",
            )
            raise Forbidden("You may not use any app here", fix="ask your administrator")
        return agent

    def _start(self, agent: AgentView, user: str, password: str | None, stdin_apps: frozenset[str]) -> None:
        """Start the agent; a failure does not fail the sign-in: the waiting page shows it."""
        stdin = None
        if agent.app in stdin_apps and password is not None:
            stdin = json.dumps({"user": user, "password": password}).encode() + b"\n"
        try:
            self._supervisor.commands.set_desired(agent.name, Desired.RUNNING, stdin=stdin)
        except NotFound:
            raise wrong_credentials() from None
        except DispatcherError as error:
            _log.warning("the agent cannot be started", agent=agent.name, why=str(error))

    def keep(self, changes: Changes) -> None:
        """Store changed accounts; after an error they are still in memory."""
        try:
            self._store.keep(changes)
        except DispatcherError as error:
            _log.error("sign-in attempts cannot be stored", why=str(error))


def wrong_credentials() -> Forbidden:
    """Return the error for a wrong password and for an unknown name."""
    return Forbidden("Wrong name or password", fix="check both and try again")
