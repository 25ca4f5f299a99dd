"""Commands on agents, from people and from the edge: they write the desired state, the `Runner` acts on it.

Each returns as soon as the desired state is written.  An agent is given by its name.

:raises NotFound: (any command) there is no such agent.
:raises Unavailable: (any command) the desired state cannot be written; nothing happened.  Stops, resets and
    removals are carried out on a full disk, too: they are the way out of it.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping
from typing import Any

from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.lifecycle import CLEARED, DEAD, Change, EventKind, Write, reached
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.agents.restarts import recent
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.host_uids import HostUids
from dispatcher.manager.storage.rows import AgentRow, Desired, KeptRow, Kind, Pending
from dispatcher.plugin.errors import BadRequest, Conflict, DispatcherError, Unsupported
from dispatcher.plugin.model import AgentEvent, Capability
from dispatcher.plugin.names import agent_name, app_name, printable

_NEEDS = {Desired.SUSPENDED: Capability.SUSPEND, Desired.HIBERNATED: Capability.HIBERNATE}

_log = logging.getLogger("dispatcher.manager")


def desired_state(text: str) -> Desired:
    """Return the desired state for a word in a user's command.

    :raises BadRequest: it is none of them.
    """
    wanted = {state.value: state for state in Desired if state is not Desired.ABSENT}
    if text not in wanted:
        raise BadRequest(f"Unknown state {printable(text)}", why=f"valid are: {', '.join(wanted)}")
    return wanted[text]


class Commands:
    """Writes desired states."""

    def __init__(self, registry: Registry, data: AgentData, uids: HostUids) -> None:
        self._registry = registry
        self._data = data
        self._uids = uids
        self._creating = threading.Lock()

    def create(self, name: str, *, app: str | None, password_hash: str | None) -> AgentRow:
        """Create an agent, stopped, and its user when that is new.

        `name` is ``USER`` or ``USER:APP``.  A user's first agent has the user's name, a further one
        ``USER:APP``: `create("alice", app="lab")` makes ``alice:lab`` when ``alice`` is of another app.

        :param password_hash: of a new user; None where an external authenticator checks passwords.
        :raises Conflict: it exists, is being removed, or a password was given for an existing user.
        :raises BadRequest: an invalid name, or no app was named and there is no default.
        """
        registry = self._registry
        with self._creating:
            name, chosen = self.check_new(name, app)
            user = name.partition(":")[0]
            with registry.name_reserved(name) as free:
                if not free:
                    raise Conflict(
                        f"The remains of an earlier agent {printable(name)} are being removed",
                        fix="try again in a moment",
                        retry_after=1.0,
                    )
                agent, event = self._insert(name, user, chosen, password_hash)
        registry.notify(agent)
        registry.observers.publish([event])
        return agent.row

    def check_new(self, name: str, app: str | None) -> tuple[str, str]:
        """Return the name and the app that an agent would get; the parameters and errors are those of `create`."""
        name = agent_name(name)
        user, _, suffix = name.partition(":")
        if suffix and app and suffix != app:
            raise BadRequest(
                f"The name {printable(name)} stands for the app {suffix}",
                why=f"the request names the app {printable(app)}",
                fix="leave one of them out",
            )
        specs = self._registry.specs
        chosen = suffix or (app_name(app) if app else specs.default_app())
        specs.check(chosen)
        return self._free_name(name, user, suffix, app), chosen

    def _insert(self, name: str, user: str, app: str, password_hash: str | None) -> tuple[Agent, AgentEvent]:
        registry = self._registry
        if password_hash is not None and registry.store.get_user(user) is not None:
            raise Conflict(
                f"The user {printable(user)} exists",
                why="a password was given, as for a new user",
                fix="leave it out, or change it with `dispatcher passwd`",
            )
        row, detail = self._new_row(name, user, app, registry.store.kept(name))
        event = registry.event(row, EventKind.CREATED, detail)
        row = registry.store.create(
            row, password_hash=password_hash, allocated=self._uids.separate, events=[event]
        )
        return registry.add(row), event

    def check_not_being_removed(self, name: str) -> None:
        """Check that no agent of a name is being removed; `name` is canonical.

        :raises Conflict: one is.
        """
        agent = self._registry.agents.get(name)
        if agent is not None and agent.row.desired is Desired.ABSENT:
            failure = agent.row.failure
            raise Conflict(
                f"The agent {printable(name)} is being removed",
                why=f"the last attempt failed: {failure.what}" if failure else "",
                fix=f"add it again when it is gone; `dispatcher why {name}` says how far the removal is",
                retry_after=1.0,
            )

    def _free_name(self, name: str, user: str, suffix: str, app: str | None) -> str:
        known = self._registry.agents
        if name in known and not suffix and app and known[name].row.app != app:
            name = f"{user}:{app}"
        self.check_not_being_removed(name)
        if name in known:
            raise Conflict(
                f"The agent {printable(name)} exists", fix="choose another name, or another app with --app"
            )
        return name

    def _new_row(self, name: str, user: str, app: str, kept: KeptRow | None) -> tuple[AgentRow, str]:
        registry = self._registry
        now = registry.clock.now()
        row = AgentRow(
            id=0,
            version=0,
            name=name,
            user=user,
            user_id=0,
            app=app,
            provider=registry.specs.config.apps[app].provider,
            uid=-1,
            created=now,
            since=now,
        )
        detail, owner = "", self._data.owner(name)
        if kept is not None:
            row = dataclasses.replace(row, provider=kept.provider, handle=kept.handle, uid=kept.uid)
            detail = "with the data that was kept when the agent of this name was removed"
        elif owner is not None:  # the database was lost, or restored from an earlier time
            row = dataclasses.replace(row, uid=owner if self._uids.may_have(owner) else -1)
            detail = "with the data that lay in its place, of an agent that the database did not know"
            _log.warning("%s is created %s", printable(name), detail)
        if row.uid == -1 or not self._uids.separate:
            row = dataclasses.replace(row, uid=self._uids.allocate())
        return row, detail

    def remove(self, name: str, *, keep_data: bool) -> None:
        """Remove an agent, and its user with the last one."""
        agent = self._registry.find(name)

        def decide(_: AgentRow) -> Change:
            fields = {"desired": Desired.ABSENT, "keep_data": keep_data, "pending": Pending.NONE}
            return self._command(agent, fields, frees=True)

        self._registry.change(agent, decide)

    def set_desired(self, name: str, desired: Desired, *, stdin: bytes | None = None) -> None:
        """Set the desired state; the newest command wins.  RUNNING also clears a failure and the restart count.

        :param stdin: credentials of the sign-in for apps that take them; kept in memory only.
        :raises Unsupported: the provider has no such state.
        :raises Conflict: the agent is being removed, or is to be suspended and does not run.
        :raises Forbidden: its user may not use the app.
        """
        agent = self._registry.find(name)
        self._check_capability(agent, desired)
        if desired is Desired.RUNNING:
            self._registry.specs.check_allowed(agent.row)

        def decide(row: AgentRow) -> Change | None:
            _check_not_removed(row)
            if desired in _NEEDS and row.observed in DEAD and row.operation not in {Kind.START, Kind.MOVE}:
                raise Conflict(
                    f"{printable(row.name)} is not running", why="only a running agent can be suspended"
                )
            if row.desired is desired and row.pending is Pending.NONE:
                if row.operation is None and row.failure is None and reached(self._registry.situation(row)):
                    return None  # no start follows: the credentials are not kept for a later one
                if row.operation is not None:
                    agent.stdin = stdin or agent.stdin
                    return None
            agent.stdin = stdin or agent.stdin
            pending = row.pending if row.pending is Pending.RESET else Pending.NONE
            fields: dict[str, Any] = {"desired": desired, "pending": pending}
            if desired is Desired.RUNNING:
                fields["attempts"] = ()
            return self._command(agent, fields, frees=desired is Desired.STOPPED)

        self._registry.change(agent, decide)

    def _check_capability(self, agent: Agent, desired: Desired) -> None:
        needed = _NEEDS.get(desired)
        backend = self._registry.backends.get(agent.row.provider)
        if needed and backend.usable and needed not in backend.capabilities:
            raise Unsupported(
                f"{printable(agent.row.name)} cannot be {desired.value}",
                why=f"the provider {backend.name} has no capability {needed.value!r} here",
                fix="stop it instead; `dispatcher providers list` shows the capabilities of each provider",
            )

    def restart(self, name: str) -> None:
        """Stop an agent, and start it with the present configuration."""
        agent = self._registry.find(name)
        self._registry.specs.spec_to_start(agent.row, None)  # what cannot start again must not be stopped

        def decide(row: AgentRow) -> Change:
            _check_not_removed(row)
            pending = row.pending if row.pending is Pending.RESET else Pending.RESTART
            return self._command(agent, {"desired": Desired.RUNNING, "pending": pending, "attempts": ()})

        self._registry.change(agent, decide)

    def reset_data(self, name: str) -> None:
        """Stop an agent, delete its data, and start it again if that is its desired state."""
        agent = self._registry.find(name)

        def decide(row: AgentRow) -> Change:
            _check_not_removed(row)
            return self._command(agent, {"pending": Pending.RESET}, frees=True)

        self._registry.change(agent, decide)

    @staticmethod
    def _command(agent: Agent, fields: dict[str, Any], *, frees: bool = False) -> Change:
        """Return the change of a command.

        :param frees: it is the way out of a full disk, so it is carried out on one, too.
        """
        agent.reason = ""
        if not agent.stuck:  # a call that hangs remains the reason why nothing happens
            fields |= CLEARED
        write = Write.UNLESS_FULL if frees else Write.REQUIRED
        return Change(fields, write=write, insist=True, urgent=True)

    # --- from the edge; unknown agents are ignored, nothing is raised

    def wake(self, name: str) -> None:
        """Start or resume an agent for a request.  Cheap and idempotent.

        A failed agent is left alone until its back-off is over, or a person starts it.
        """
        agent = self._registry.agents.get(name)
        if agent is None or (agent.row.desired is Desired.RUNNING and (agent.row.operation or agent.row.ready)):
            return

        def decide(row: AgentRow) -> Change | None:
            if row.desired is Desired.ABSENT or (row.failure is not None and not self._may_retry(row)):
                return None
            if row.desired is Desired.RUNNING and row.failure is None:
                return None if row.operation or reached(self._registry.situation(row)) else Change(urgent=True)
            return _run(urgent=True)

        try:
            self._registry.change(agent, decide)
        except DispatcherError as error:
            _log.error("%s cannot be woken: %s", printable(name), error)

    def _may_retry(self, row: AgentRow) -> bool:
        """Whether a request starts a failed agent: not in back-off, nor given up a short while ago."""
        if row.failure is None or row.failure.final:
            return False
        return row.retry_at is None and not recent(row.attempts, self._registry.clock.now())

    def record_activity(self, name: str, activity: Mapping[str, int]) -> None:
        """Record activity by class (docs/reference/feed.md).  Use keeps an idle agent awake.

        A state that a person asked for stays: the use may be seconds older, and a later request wakes the agent.
        """
        agent = self._registry.agents.get(name)
        if agent is None or not (activity.get("use", 0) > 0 or activity.get("stream", 0) > 0):
            return
        agent.last_used = self._registry.clock.now()
        row = agent.row
        if row.desired not in _NEEDS or not (agent.reason or row.failure):
            return
        if row.operation in {Kind.SUSPEND, Kind.HIBERNATE} or self._registry.is_served(row):
            try:
                self._registry.change(agent, lambda row: _run() if row.desired in _NEEDS else None)
            except DispatcherError as error:
                _log.error("%s: %s", printable(name), error)


def _run(*, urgent: bool = False) -> Change:
    return Change({"desired": Desired.RUNNING, **CLEARED}, write=Write.REQUIRED, insist=True, urgent=urgent)


def _check_not_removed(row: AgentRow) -> None:
    if row.desired is Desired.ABSENT:
        raise Conflict(f"{printable(row.name)} is being removed", fix="add it again afterwards")
