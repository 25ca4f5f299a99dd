"""What people and the edge want of an agent.  Writes the intent; `operations` acts on it."""

from __future__ import annotations

import dataclasses
import logging
import os
import pwd
import threading
from collections.abc import Mapping

from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.lifecycle import DEAD, Desired, Kind, Pending, reached, recent
from dispatcher.manager.agents.registry import Change, Engine
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.agents import AgentRow, KeptRow
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, Conflict, DispatcherError, Unsupported
from dispatcher.plugin.model import AgentEvent, Capability

_NEEDS = {Desired.SUSPENDED: Capability.SUSPEND, Desired.HIBERNATED: Capability.HIBERNATE}

_log = logging.getLogger("dispatcher.manager")


class Intents:
    """Turns requests into changes of what is desired."""

    def __init__(self, engine: Engine, data: AgentData, accounts: HostAccounts) -> None:
        self._engine = engine
        self._data = data
        self._uids = accounts.agent_uids
        self._creating = threading.Lock()
        self._last_uid = -1

    # --- agents come

    def create(self, name: str, *, app: str | None, password_hash: str | None) -> AgentRow:
        """Make an agent, stopped, and its user when that is new."""
        engine = self._engine
        name = names.agent_name(name)
        user, _, suffix = name.partition(":")
        if suffix and app and suffix != app:
            raise BadRequest(
                f"The agent {names.printable(name)} would be of the app {suffix}",
                why=f"the app {names.printable(app)} was named, too",
                fix="leave one of them out",
            )
        chosen = suffix or (names.app_name(app) if app else engine.specs.default_app())
        engine.specs.check(chosen)
        with self._creating:
            name = self._free_name(name, user, suffix, app)
            with engine.claimed(name) as free:
                if not free:
                    raise Conflict(
                        f"What an earlier agent {names.printable(name)} left is being removed",
                        fix="try again in a moment",
                        retry_after=1.0,
                    )
                agent, event = self._make(name, user, chosen, password_hash)
        engine.announce(agent)
        engine.history.tell([event])
        return agent.row

    def _make(self, name: str, user: str, app: str, password_hash: str | None) -> tuple[Agent, AgentEvent]:
        engine = self._engine
        if password_hash is not None and engine.store.get_user(user) is not None:
            raise Conflict(
                f"The user {names.printable(user)} exists",
                why="a password was given, as for a new one",
                fix="leave it out, or change it with `dispatcher passwd`",
            )
        row, detail = self._new_row(name, user, app, engine.store.kept(name))
        event = engine.event(row, "created", detail)
        row = engine.store.create(
            row, password_hash=password_hash, allocated=self._uids is not None, events=[event]
        )
        return engine.add(row), event

    def _free_name(self, name: str, user: str, suffix: str, app: str | None) -> str:
        known = self._engine.agents
        if name in known and not suffix and app and known[name].row.app != app:
            name = f"{user}:{app}"
        if name in known:
            going = known[name].row.desired is Desired.ABSENT
            raise Conflict(
                f"The agent {names.printable(name)} {'is being removed' if going else 'exists'}",
                fix="try again in a moment" if going else "choose another name, or another app with --app",
                retry_after=1.0 if going else None,
            )
        return name

    def _new_row(self, name: str, user: str, app: str, kept: KeptRow | None) -> tuple[AgentRow, str]:
        engine = self._engine
        now = engine.clock.now()
        row = AgentRow(
            id=0,
            version=0,
            name=name,
            user=user,
            user_id=0,
            app=app,
            provider=engine.specs.config.apps[app].provider,
            uid=-1,
            created=now,
            since=now,
        )
        if kept is not None:
            row = dataclasses.replace(row, provider=kept.provider, handle=kept.handle, uid=kept.uid)
            detail = "with the data that was kept when the agent of this name was removed"
        else:
            aside = self._data.set_aside(name)
            detail = f"data of unknown origin was in its place, and is now in {aside}" if aside else ""
        if row.uid == -1 or self._uids is None:
            row = dataclasses.replace(row, uid=self._allocate())
        return row, detail

    def _allocate(self) -> int:
        """Return a host user id that no agent, no kept data and no account of the host has."""
        if self._uids is None:
            return os.geteuid()
        first, last = self._uids
        span = last - first + 1
        if self._last_uid < first:  # two installations on one host should not begin at the same one
            begin = first + int(self._engine.installation, 16) % span
            self._last_uid = self._engine.store.last_uid() or begin
        for step in range(1, span + 1):
            uid = first + (self._last_uid - first + step) % span
            if not self._engine.store.is_taken(uid) and not _is_account(uid):
                self._last_uid = uid
                return uid
        raise Conflict(
            "No host user id is left for a new agent",
            why=f"all of {first} to {last} are taken",
            fix="widen manager.uid_range",
        )

    # --- what is desired

    def remove(self, agent: Agent, *, keep_data: bool) -> None:
        """Let an agent go."""

        def decide(row: AgentRow) -> Change:
            fields = {"desired": Desired.ABSENT, "keep_data": keep_data, "pending": Pending.NONE}
            return self._intent(agent, row, fields)

        self._engine.change(agent, decide)

    def set_desired(self, agent: Agent, state: str, *, stdin: bytes | None) -> None:
        """Say what an agent shall be."""
        try:
            desired = Desired(state)
        except ValueError:
            desired = Desired.ABSENT
        if desired is Desired.ABSENT:
            raise BadRequest(
                f"There is no state {names.printable(state)} to ask for",
                why="valid are: running, suspended, hibernated, stopped",
            )
        self._check_capability(agent, desired)

        def decide(row: AgentRow) -> Change | None:
            self._check_not_going(row)
            asleep = desired in _NEEDS
            if asleep and row.observed in DEAD and row.operation not in {Kind.START, Kind.MOVE}:
                raise Conflict(
                    f"{names.printable(row.name)} does not run", why="what has ended has nothing to put to sleep"
                )
            if row.desired is desired and row.pending is Pending.NONE:
                now = self._engine.situation(row)
                if row.operation is None and row.failure is None and reached(now):
                    return None  # nothing will be started: the credentials are not kept for later
                if row.operation is not None:
                    agent.stdin = stdin or agent.stdin
                    return None
            agent.stdin = stdin or agent.stdin
            pending = row.pending if row.pending is Pending.RESET else Pending.NONE
            fields: dict[str, object] = {"desired": desired, "pending": pending}
            if desired is Desired.RUNNING:
                fields["attempts"] = ()
            return self._intent(agent, row, fields)

        self._engine.change(agent, decide)

    def _check_capability(self, agent: Agent, desired: Desired) -> None:
        needed = _NEEDS.get(desired)
        backend = self._engine.backends.get(agent.row.provider)
        if needed and backend.usable and needed not in backend.capabilities:
            raise Unsupported(
                f"{names.printable(agent.row.name)} cannot be {desired.value}",
                why=f"the provider {backend.name} has no capability {needed.value!r} here",
                fix="stop it instead; `dispatcher providers list` shows what each provider can do",
            )

    def restart(self, agent: Agent) -> None:
        """Stop, renew, start."""

        def decide(row: AgentRow) -> Change:
            self._check_not_going(row)
            pending = row.pending if row.pending is Pending.RESET else Pending.RESTART
            return self._intent(agent, row, {"desired": Desired.RUNNING, "pending": pending, "attempts": ()})

        self._engine.change(agent, decide)

    def reset_data(self, agent: Agent) -> None:
        """Stop, delete the data, start again if it shall run."""

        def decide(row: AgentRow) -> Change:
            self._check_not_going(row)
            return self._intent(agent, row, {"pending": Pending.RESET})

        self._engine.change(agent, decide)

    def _intent(self, agent: Agent, row: AgentRow, fields: dict[str, object]) -> Change:
        agent.reason = ""
        if not agent.stuck:  # a call that hangs goes on to be the reason why nothing happens
            fields |= {"failure": None, "retry_at": None}
        return Change(fields, strict=True, insist=True, urgent=True)

    @staticmethod
    def _check_not_going(row: AgentRow) -> None:
        if row.desired is Desired.ABSENT:
            raise Conflict(f"{names.printable(row.name)} is being removed", fix="add it again once it is gone")

    # --- the edge

    def wake(self, agent: Agent) -> None:
        """Somebody sent a request."""

        def decide(row: AgentRow) -> Change | None:
            if row.desired is Desired.ABSENT or (row.failure is not None and not self._may_try_again(row)):
                return None
            if row.desired is Desired.RUNNING and row.failure is None:
                return None if row.operation or reached(self._engine.situation(row)) else Change(urgent=True)
            fields = {"desired": Desired.RUNNING, "failure": None, "retry_at": None}
            return Change(fields, strict=True, insist=True, urgent=True)

        row = agent.row
        if row.desired is Desired.RUNNING and (row.operation or row.ready):
            return
        try:
            self._engine.change(agent, decide)
        except DispatcherError as error:
            _log.error("%s cannot be woken: %s", names.printable(row.name), error)

    def _may_try_again(self, row: AgentRow) -> bool:
        """Whether a request starts what has failed: no longer in back-off, nor given up a short while ago."""
        if row.failure is None or row.failure.final:
            return False
        now = self._engine.clock.now()
        return row.retry_at is None and not recent(row.attempts, now)

    def touch(self, agent: Agent, activity: Mapping[str, int]) -> None:
        """Count activity.  Use keeps an agent awake that was about to be put to sleep because nobody used it.

        What somebody asked for stays: the use may be seconds older than that, and a request that comes later wakes
        the agent by itself.
        """
        if not (activity.get("use", 0) > 0 or activity.get("stream", 0) > 0):
            return
        agent.last_used = self._engine.clock.now()
        row = agent.row
        if row.desired not in _NEEDS or not (agent.reason or row.failure):
            return
        if row.operation in {Kind.SUSPEND, Kind.HIBERNATE} or self._engine.served(row):
            self.wake_for_use(agent)

    def wake_for_use(self, agent: Agent) -> None:
        """Take back the wish that an agent shall sleep: it is being used."""

        def decide(row: AgentRow) -> Change | None:
            if row.desired not in _NEEDS:
                return None
            return Change(
                {"desired": Desired.RUNNING, "failure": None, "retry_at": None}, strict=True, insist=True
            )

        try:
            self._engine.change(agent, decide)
        except DispatcherError as error:
            _log.error("%s: %s", names.printable(agent.row.name), error)

    # --- the dispatcher itself

    def idle(self, agent: Agent, desired: Desired, reason: str) -> bool:
        """Put an agent to rest that nobody uses, unless something happened to it meanwhile."""
        before = agent.row

        def decide(row: AgentRow) -> Change | None:
            if row is not before or row.operation is not None:
                return None
            agent.reason = reason
            return Change({"desired": desired}, strict=True)

        return self._engine.change(agent, decide)


def _is_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True
