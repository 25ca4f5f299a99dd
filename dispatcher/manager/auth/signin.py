"""Signing in: throttle, authenticator, session, and the agent that starts meanwhile.  No HTTP, no SQL of its own.

Whether a name exists must not be learned here: unknown and known names are counted, delayed and refused alike.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass

from dispatcher.common.log import logger
from dispatcher.manager.agents.lifecycle import Desired
from dispatcher.manager.agents.metrics import Metrics
from dispatcher.manager.agents.supervisor import Supervisor
from dispatcher.manager.agents.views import AgentView
from dispatcher.manager.auth import local
from dispatcher.manager.auth.passwords import Hasher, HashPool, check_length
from dispatcher.manager.auth.sessions import Sessions, digest, new_token
from dispatcher.manager.auth.throttle import Changes, Throttle, address_key
from dispatcher.manager.storage.auth import AuthStore, SessionRow, Visitor
from dispatcher.plugin import names
from dispatcher.plugin.authenticator import Authenticator
from dispatcher.plugin.deadline import Deadline, SteadyWallClock
from dispatcher.plugin.errors import BadRequest, Conflict, DispatcherError, Forbidden, NotFound, TooManyRequests

TIMEOUT = 30.0  # seconds for a check of a password, waiting included

_log = logger("manager.signin")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """What a sign-in gives: tokens for two cookies, and the session."""

    token: str
    device: str
    session: SessionRow


class SignIn:
    """Everything that looks at passwords."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        supervisor: Supervisor,
        sessions: Sessions,
        store: AuthStore,
        pool: HashPool,
        hasher: Hasher,
        clock: SteadyWallClock,
        metrics: Metrics,
    ) -> None:
        self.authenticator = authenticator
        self._supervisor = supervisor
        self._sessions = sessions
        self._store = store
        self._pool = pool
        self._hasher = hasher
        self._clock = clock
        self._metrics = metrics
        self._throttle = Throttle(store.accounts())

    @property
    def local(self) -> bool:
        """Whether the manager keeps the passwords itself."""
        return self.authenticator.name == local.NAME

    def sign_in(
        self, raw_name: str, password: str, visitor: Visitor, device: str | None, stdin_apps: frozenset[str]
    ) -> SignedIn:
        """Check a password, start the user's agent and make a session.

        :param device: token of an earlier sign-in from this browser.
        :param stdin_apps: apps that take the credentials on standard input.
        :raises Forbidden: wrong password or unknown name, alike; or the user has no agent.
        :raises TooManyRequests: too many attempts, or too many at once.
        :raises Unavailable: the directory of passwords cannot be asked.
        """
        name = self._name(raw_name)
        epoch = self._sessions.epoch(name)
        user = self.check(name, password, visitor.address, device)
        if user != name:  # the directory's spelling
            epoch = self._sessions.epoch(user)
        agent = self._default_agent(user)
        self._start(agent, user, password, stdin_apps)
        known = device is not None and self._store.knows_device(digest(device), user, self._clock.now())
        kept = device if known and device else new_token()
        token, row = self._sessions.create(user, agent.name, visitor, epoch=epoch, device=digest(kept))
        self._metrics.login("success")
        _log.info("signed in", user=user, address=visitor.address, session=row.sha256[:8])
        return SignedIn(token=token, device=kept, session=row)

    def check(self, name: str, password: str, address: str | None, device: str | None = None) -> str:
        """Return the canonical name of whom a password belongs to, counting the attempt.

        :param name: canonical; :param address: of the browser, None for an administrator's own check.
        :raises Forbidden: it does not; :raises TooManyRequests: as `sign_in`.
        """
        now = self._clock.now()
        keys = [f"name:{name}", *([address_key(address)] if address is not None else [])]
        if device is not None and self._store.knows_device(digest(device), name, now):
            keys = [f"device:{digest(device)}"]
        try:
            self._keep(self._throttle.admit(keys, now))
        except TooManyRequests:
            self._metrics.login("throttled")
            _log.debug("slowed down", user=name, address=address)
            raise
        try:
            deadline = Deadline(TIMEOUT)
            identity = self._pool.run(
                lambda: self.authenticator.authenticate(name, password, deadline=deadline), deadline
            )
        except DispatcherError as error:
            self._keep(self._throttle.succeeded(keys, now))
            self._metrics.login("busy" if isinstance(error, TooManyRequests) else "unavailable")
            raise
        if identity is None:
            self._keep(self._throttle.failed(keys, now))
            self._metrics.login("failure")
            _log.info("wrong name or password", user=name, address=address)
            raise wrong()
        own = [key for key in keys if not key.startswith("address:")]
        self._keep(self._throttle.succeeded(keys, now, forget=own))
        return names.user_name(identity.user)

    def hash_new(self, password: str) -> str:
        """Return the hash of a new user's password.

        :raises BadRequest: too short, too long; or passwords are kept elsewhere.
        """
        if not self.local:
            raise BadRequest(
                "A password was given",
                why=f"passwords are kept by the authenticator {self.authenticator.name}",
                fix="leave it out",
            )
        check_length(password)
        deadline = Deadline(TIMEOUT)
        return self._pool.run(lambda: self._hasher.hash(password), deadline)

    def set_password(self, user: str, password: str) -> None:
        """Change a password.  The caller ends the sessions.

        :raises BadRequest: too short or too long; :raises Unsupported: passwords are kept elsewhere.
        """
        check_length(password)
        deadline = Deadline(TIMEOUT)
        self._pool.run(lambda: self.authenticator.set_password(user, password, deadline=deadline), deadline)
        self._keep(self._throttle.succeeded([], self._clock.now(), forget=[f"name:{user}"]))
        _log.info("password changed", user=user)

    def _name(self, raw: str) -> str:
        """Return the canonical name; one that nobody can have is refused like a wrong password."""
        try:
            return names.user_name(raw)
        except BadRequest:
            self._metrics.login("failure")
            _log.info("wrong name or password", user=raw)
            raise wrong() from None

    def _default_agent(self, user: str) -> AgentView:
        """Return the agent that a sign-in leads to; with an external authenticator it is made at the first one."""
        agents = self._agents(user)
        if not agents and not self.local:
            with contextlib.suppress(Conflict):
                self._supervisor.create(user, app=None, password_hash=None)
            agents = self._agents(user)
        if not agents:
            self._metrics.login("failure")
            raise wrong()
        return next((agent for agent in agents if agent.name == user), agents[0])

    def _agents(self, user: str) -> list[AgentView]:
        return [view for view in self._supervisor.views(user=user) if view.desired is not Desired.ABSENT]

    def _start(self, agent: AgentView, user: str, password: str, stdin_apps: frozenset[str]) -> None:
        """Have the agent run; a sign-in succeeds even if it cannot: the waiting page says why."""
        stdin = None
        if agent.app in stdin_apps:
            stdin = json.dumps({"user": user, "password": password}).encode() + b"\n"
        try:
            self._supervisor.set_desired(agent.name, Desired.RUNNING.value, stdin=stdin)
        except NotFound:
            raise wrong() from None
        except DispatcherError as error:
            _log.warning("the agent cannot be started", agent=agent.name, why=str(error))

    def _keep(self, changes: Changes) -> None:
        """Write down who is slowed; if that fails, this process still knows."""
        try:
            self._store.keep(changes)
        except DispatcherError as error:
            _log.error("attempts to sign in cannot be written down", why=str(error))


def wrong() -> Forbidden:
    """Return the one answer to a wrong password and to an unknown name."""
    return Forbidden("Wrong name or password", fix="check both and try again")
