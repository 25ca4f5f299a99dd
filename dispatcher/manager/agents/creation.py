"""Creating an agent, and its user with the first one."""

from __future__ import annotations

import dataclasses
import threading

from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.change import EventKind
from dispatcher.manager.agents.host_uids import HostUids
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.rows import AgentRow, KeptRow
from dispatcher.manager.storage.states import Desired
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, Conflict
from dispatcher.plugin.model import AgentEvent


class Creation:
    """Creates agents, one at a time."""

    def __init__(self, registry: Registry, data: AgentData, uids: HostUids) -> None:
        self._registry = registry
        self._data = data
        self._uids = uids
        self._creating = threading.Lock()

    def create(self, name: str, *, app: str | None, password_hash: str | None) -> AgentRow:
        """Create an agent, as `Commands.create`."""
        registry = self._registry
        name = names.agent_name(name)
        user, _, suffix = name.partition(":")
        if suffix and app and suffix != app:
            raise BadRequest(
                f"The name {names.printable(name)} stands for the app {suffix}",
                why=f"the request names the app {names.printable(app)}",
                fix="leave one of them out",
            )
        chosen = suffix or (names.app_name(app) if app else registry.specs.default_app())
        registry.specs.check(chosen)
        with self._creating:
            name = self._free_name(name, user, suffix, app)
            with registry.name_reserved(name) as free:
                if not free:
                    raise Conflict(
                        f"The remains of an earlier agent {names.printable(name)} are being removed",
                        fix="try again in a moment",
                        retry_after=1.0,
                    )
                agent, event = self._insert(name, user, chosen, password_hash)
        registry.notify(agent)
        registry.observers.publish([event])
        return agent.row

    def _insert(self, name: str, user: str, app: str, password_hash: str | None) -> tuple[Agent, AgentEvent]:
        registry = self._registry
        if password_hash is not None and registry.store.get_user(user) is not None:
            raise Conflict(
                f"The user {names.printable(user)} exists",
                why="a password was given, as for a new user",
                fix="leave it out, or change it with `dispatcher passwd`",
            )
        row, detail = self._new_row(name, user, app, registry.store.kept(name))
        event = registry.event(row, EventKind.CREATED, detail)
        row = registry.store.create(
            row, password_hash=password_hash, allocated=self._uids.separate, events=[event]
        )
        return registry.add(row), event

    def _free_name(self, name: str, user: str, suffix: str, app: str | None) -> str:
        known = self._registry.agents
        if name in known and not suffix and app and known[name].row.app != app:
            name = f"{user}:{app}"
        if name in known:
            removing = known[name].row.desired is Desired.ABSENT
            raise Conflict(
                f"The agent {names.printable(name)} {'is being removed' if removing else 'exists'}",
                fix="try again in a moment" if removing else "choose another name, or another app with --app",
                retry_after=1.0 if removing else None,
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
        if kept is not None:
            row = dataclasses.replace(row, provider=kept.provider, handle=kept.handle, uid=kept.uid)
            detail = "with the data that was kept when the agent of this name was removed"
        else:
            aside = self._data.move_aside(name)
            detail = f"data of unknown origin was in its place, and is now in {aside}" if aside else ""
        if row.uid == -1 or not self._uids.separate:
            row = dataclasses.replace(row, uid=self._uids.allocate())
        return row, detail
