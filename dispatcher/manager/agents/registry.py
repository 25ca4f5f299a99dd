"""The registry: has all agents in memory and applies every change to them.

A change goes through `Registry.change` or `Registry.finish`: under the agent's lock the new row and the next
operation are computed (`lifecycle`), written in one transaction, and made visible; afterwards waiting threads and
subscribers are notified.  The only call to a provider is `handle`, which does no I/O.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dispatcher.common.contained import bounded, shown, text
from dispatcher.common.log import clean
from dispatcher.common.timers import Timers
from dispatcher.manager.agents.agent import Agent, AgentView, Availability, Operation, Status, view_of
from dispatcher.manager.agents.lifecycle import (
    ASLEEP,
    CLEARED,
    NO_OPERATION,
    Change,
    EventKind,
    FeedState,
    Situation,
    Write,
    feed_state,
    next_operation,
    public_state,
    reached,
    superseded,
)
from dispatcher.manager.agents.observers import Observers
from dispatcher.manager.agents.specs import Specs
from dispatcher.manager.backends.backend import Backend, Backends
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.quota import DiskUse
from dispatcher.manager.storage.agents import Store
from dispatcher.manager.storage.database import DiskFull
from dispatcher.manager.storage.rows import AgentRow, Desired, Failure, Kind, Pending
from dispatcher.manager.storage.write_buffer import WriteBuffer
from dispatcher.plugin import names
from dispatcher.plugin.deadline import SteadyWallClock
from dispatcher.plugin.errors import DispatcherError, NotFound
from dispatcher.plugin.model import AgentEvent, Capability

HANDLE = 1.0  # seconds for a provider to name an agent that does not exist yet
REPEAT = 1.0  # seconds until a subscriber to removals that failed is called again

_log = logging.getLogger("dispatcher.manager")

Decide = Callable[[AgentRow], "Change | None"]


@dataclasses.dataclass(kw_only=True, eq=False)
class Registry:
    """All agents of the installation.

    :ivar submit: runs an operation (set by `Runner`).
    :ivar on_step: called with ``(agent, kind, step)`` before each step of each operation.
    :ivar wait_for_edge: returns when the edge has applied all changes so far, or after a moment.
    """

    store: Store
    clock: SteadyWallClock
    specs: Specs
    backends: Backends
    observers: Observers
    timers: Timers
    installation: str
    data: AgentData

    def __post_init__(self) -> None:
        self.buffer = WriteBuffer(self.store)
        self.agents: dict[str, Agent] = {}
        self._by_user: dict[str, dict[str, Agent]] = {}
        self.by_backend_name: dict[str, Agent] = {}
        self._names_lock = threading.Lock()
        self._reserved_names: set[str] = set()
        self.submit: Callable[[Agent, Operation, bool], None] = lambda _agent, _operation, _urgent: None
        self.on_step: Callable[[str, Kind, str], None] = lambda _agent, _kind, _step: None
        self.wait_for_edge: Callable[[], object] = lambda: None
        self._on_change: list[Callable[[str], None]] = []
        self._on_removal: list[Callable[[str, str], None]] = []

    # --- agents

    def find(self, name: str) -> Agent:
        """Return an agent.

        :raises NotFound: there is none of that name.
        """
        agent = self.agents.get(name)
        if agent is None:
            raise NotFound(f"There is no agent {names.printable(name)}", fix="`dispatcher list` shows all agents")
        return agent

    def backend(self, row: AgentRow) -> Backend:
        """Return the backend that has an agent."""
        return self.backends.get(row.provider)

    def of_provider(self, provider: str) -> list[Agent]:
        """Return the agents that a provider has now."""
        return [agent for agent in list(self.agents.values()) if agent.row.provider == provider]

    def of_user(self, user: str) -> list[Agent]:
        """Return a user's agents, the oldest first."""
        return sorted(self._by_user.get(user, {}).copy().values(), key=lambda agent: agent.row.id)

    def user_id(self, user: str) -> int | None:
        """Return the id of the user who has a name now."""
        return next((agent.row.user_id for agent in self._by_user.get(user, {}).copy().values()), None)

    def add(self, row: AgentRow) -> Agent:
        """Take an agent that is in the store into memory."""
        agent = Agent(row)
        agent.state = public_state(self.situation(row, insist=True))
        with self._names_lock:
            self.agents[row.name] = agent
            self._by_user.setdefault(row.user, {})[row.name] = agent
            self.by_backend_name[names.backend_name(self.installation, row.name)] = agent
        return agent

    def drop(self, agent: Agent) -> None:
        """Drop an agent that was removed from the store."""
        with self._names_lock:
            if self.agents.get(agent.row.name) is agent:
                del self.agents[agent.row.name]
                del self._by_user[agent.row.user][agent.row.name]
                if not self._by_user[agent.row.user]:
                    del self._by_user[agent.row.user]
                del self.by_backend_name[names.backend_name(self.installation, agent.row.name)]
        with agent.lock:
            agent.availability = Availability.GONE
            agent.operation = None
            agent.changed.notify_all()
        self.notify(agent)
        self._removed(agent.row.name, agent.row.user)

    @contextmanager
    def name_reserved(self, name: str) -> Iterator[bool]:
        """Reserve a name inside the block, for a new agent or for removing an unknown one; False: it is taken."""
        with self._names_lock:
            free = name not in self._reserved_names
            self._reserved_names.add(name)
        try:
            yield free
        finally:
            if free:
                with self._names_lock:
                    self._reserved_names.discard(name)

    def view(self, agent: Agent) -> AgentView:
        """Return a snapshot of an agent; takes no lock."""
        row = agent.row
        return view_of(
            row,
            self.situation(row),
            agent.operation,
            self.backend(row),
            outdated=self.specs.outdated(row),
            last_used=agent.last_used,
            notice=agent.notice[0] if self.clock.now() < agent.notice[1] else "",
            disk=agent.disk,
            now=self.clock.now(),
        )

    def measure(self, agent: Agent) -> DiskUse | None:
        """Return what an agent's data takes, as it was last measured where that needs a backend."""
        if Capability.OWN_DATA not in self.backend(agent.row).capabilities:
            agent.disk = self.data.usage(agent.row.name, agent.row.uid)
        return agent.disk

    # --- subscriptions

    def subscribe(self, on_change: Callable[[str], None]) -> None:
        """Call `on_change(name)` after every change and removal, from any thread; it must be quick."""
        self._on_change.append(on_change)

    def on_removal(self, call: Callable[[str, str], None]) -> None:
        """Call `call(name, user)` when a removal is written, before the agent is stopped, and when it is gone.

        It must be idempotent: after an exception it is called again, until it succeeds.
        """
        self._on_removal.append(call)

    def _removed(self, name: str, user: str, calls: Iterable[Callable[[str, str], None]] | None = None) -> None:
        failed = _call_all(self._on_removal if calls is None else calls, name, user)
        if failed:
            self.timers.after(REPEAT, lambda: self._removed(name, user, failed))

    def notify(self, agent: Agent) -> None:
        """Notify subscribers of a change.  The agent's lock is not held."""
        _call_all(self._on_change, agent.row.name)

    # --- changes

    def situation(self, row: AgentRow, *, insist: bool = False) -> Situation:
        """Return the facts about an agent.

        :param insist: assume that the backend answers.
        """
        held = row.failure is not None and (row.retry_at is None or self.clock.now() < row.retry_at)
        return Situation(
            desired=row.desired,
            observed=row.observed,
            ready=row.ready,
            reachable=insist or self.backend(row).reachable,
            operation=row.operation,
            pending=row.pending,
            moving=row.move is not None or self.specs.provider(row) != row.provider,
            failed=row.failure is not None,
            held=held,
        )

    def is_served(self, row: AgentRow) -> bool:
        """Whether requests go to the agent now."""
        return feed_state(self.situation(row)) is FeedState.RUNNING

    def change(self, agent: Agent, decide: Decide) -> bool:
        """Apply the change that `decide(row)` returns; return whether there was one.

        :raises Unavailable: the change must be written and cannot be; it did not happen.
        """
        with agent.lock:
            if agent.gone:
                return False
            change = decide(agent.row)
            if change is None:
                return False
            before = agent.row
            operation = self.apply(agent, change)
            after = agent.row
            if after is not before:
                agent.changed.notify_all()
        if after.desired is Desired.ABSENT and before.desired is not Desired.ABSENT:
            self._removed(agent.row.name, agent.row.user)
        if after is not before:
            self.notify(agent)
        if operation:
            self.submit(agent, operation, change.urgent)
        return True

    def reevaluate(self, agent: Agent) -> None:
        """Begin the next operation, if there is one."""
        self.change(agent, lambda _: Change())

    def finish(self, agent: Agent, operation: Operation, change: Change) -> Operation | None:
        """End an operation with its result; return the next one, for the same thread to run.

        The result of an abandoned operation is ignored: the caller observes the agent instead.
        """
        with agent.lock:
            if operation.status is Status.ABANDONED or agent.operation is not operation:
                return None
            agent.operation = None
            agent.epoch += 1
            fields = {**change.fields, **NO_OPERATION}
            if operation.status is Status.CANCELLED:  # its failure says nothing about the newer command
                for name in ("failure", "retry_at", "attempts"):
                    fields.pop(name, None)
            try:
                following = self.apply(agent, dataclasses.replace(change, fields=fields))
            except BaseException as error:  # a value that cannot be stored: the operation ends all the same
                name = names.printable(agent.row.name)
                _log.error("%s: the result of an operation cannot be stored", name, exc_info=shown(error))
                following = self.apply(agent, _unstored(error, self.clock.now()))
            agent.changed.notify_all()
        self.notify(agent)
        return following

    def apply(self, agent: Agent, change: Change) -> Operation | None:
        """Apply a change and write it; return the operation that begins.  The agent's lock is held."""
        before = agent.row
        row = dataclasses.replace(before, **change.fields) if change.fields else before
        reported = list(change.events)
        operation: Operation | None = None
        if row.failure is not None and reached(self.situation(row)):
            row = dataclasses.replace(row, **CLEARED)
        if agent.operation is None and agent.availability is Availability.FREE:
            kind = next_operation(self.situation(row, insist=change.insist))
            if kind is not None:
                operation = Operation(kind, self.clock.now())
                idle, idle_reported = row, list(reported)
                row = self._begin(agent, row, operation, reported)
        if public_state(self.situation(row)) is not agent.state:
            row = dataclasses.replace(row, since=self.clock.now())
        if row == before and not reported:
            return None
        row = dataclasses.replace(row, version=before.version + 1, last_used=agent.last_used)
        events = [(row.id, self.event(row, kind, detail)) for kind, detail in reported]
        if change.write is Write.LATER and operation is None:
            self.buffer.add(row, events)
        elif events or self.buffer.holds(row) or _stored(row) != _stored(before):
            try:
                self.store.save([row], events)
            except DispatcherError as error:
                unwritten = change.write is Write.UNLESS_FULL and isinstance(error, DiskFull)
                if change.write in {Write.REQUIRED, Write.UNLESS_FULL} and not unwritten:
                    raise
                _log.error("%s: %s", names.printable(row.name), error)
                if operation is not None and not unwritten:  # what cannot be written does not begin
                    operation = None
                    row = dataclasses.replace(idle, version=row.version)
                    events = [(row.id, self.event(row, kind, detail)) for kind, detail in idle_reported]
                self.buffer.add(row, events)
        agent.row = row
        agent.state = public_state(self.situation(row))
        if operation is not None:
            agent.operation = operation
            agent.epoch += 1
        elif agent.operation is not None and superseded(agent.operation.kind, row.desired, row.pending):
            agent.operation.cancel()
        if row.retry_at is not None and row.retry_at != before.retry_at:
            self.timers.after(row.retry_at - self.clock.now() + 0.001, lambda: self.reevaluate(agent))
        if events:
            self.observers.publish(event for _, event in events)
        return operation

    def _begin(
        self, agent: Agent, row: AgentRow, operation: Operation, reported: list[tuple[EventKind, str]]
    ) -> AgentRow:
        fields: dict[str, Any] = {"operation": operation.kind, "step": "", "operation_since": operation.since}
        if operation.kind in {Kind.START, Kind.MOVE}:
            fields["ready"] = False
            if row.pending is Pending.RESTART:
                fields["pending"] = Pending.NONE
            if row.observed not in ASLEEP:
                reported.append((EventKind.STARTING, ""))
            if not row.handle and operation.kind is Kind.START:
                fields["handle"] = self._planned_handle(row)
        elif operation.kind is Kind.STOP:
            reported.append((EventKind.STOPPING, ""))
        return dataclasses.replace(row, **fields)

    def _planned_handle(self, row: AgentRow) -> str:
        """Return the handle that the agent will have; "" after an error, which the start will raise again."""
        backend = self.backend(row)
        try:
            provider, spec = backend.provider, self.specs.spec(row)
            # The caller may be a request, and has the agent's lock.
            return bounded(
                backend.plugin, "handle", lambda: provider.handle(spec), seconds=HANDLE, log=None
            ).to_json()
        except DispatcherError:
            return ""

    def use_specs(self, specs: Specs) -> int:
        """Use new specs, and retry final failures; return how many agents are newly outdated."""
        old, self.specs = self.specs, specs
        newly = 0
        for agent in list(self.agents.values()):
            became = specs.outdated(agent.row) and not old.outdated(agent.row)
            newly += became

            def decide(row: AgentRow, became: bool = became) -> Change:
                fields = {}
                if row.failure is not None and row.failure.final:
                    fields["retry_at"] = self.clock.now()
                events = [(EventKind.OUTDATED, "the configuration has changed")] if became else []
                return Change(fields, events, write=Write.LATER)

            self.change(agent, decide)
        self.flush()
        return newly

    def flush(self) -> None:
        """Write buffered rows and events, and continue where a write had failed."""
        for row in self.buffer.flush():
            agent = self.agents.get(row.name)
            if agent and agent.operation is None and next_operation(self.situation(agent.row)) is not None:
                self.reevaluate(agent)

    def write_last_used(self) -> None:
        """Write when agents were last used, where that changed."""
        for agent in list(self.agents.values()):
            if agent.last_used != agent.row.last_used:
                with agent.lock:
                    row = agent.row
                    agent.row = dataclasses.replace(row, version=row.version + 1, last_used=agent.last_used)
                    self.buffer.add(agent.row)
        self.flush()

    # --- events

    def event(self, row: AgentRow, kind: EventKind, detail: str = "") -> AgentEvent:
        """Return an event of this moment."""
        return AgentEvent(
            time=self.clock.now(),
            agent=row.name,
            user=row.user,
            app=row.app,
            kind=kind.value,
            detail=clean(detail, 1000) if detail else "",
        )


def _unstored(error: BaseException, now: float) -> Change:
    """Return the end of an operation whose result cannot be stored."""
    what = "The result of the operation cannot be stored"
    why, fix = f"{type(error).__name__}: {clean(text(error, 300), 300)}", "read the manager's log, and report it"
    failure = Failure(what=what, why=why, fix=fix, time=now)
    return Change({**NO_OPERATION, "failure": failure, "retry_at": None}, [(EventKind.FAILED, f"{what}: {why}")])


def _call_all(subscribers: Iterable[Callable[..., None]], *arguments: str) -> list[Callable[..., None]]:
    """Call each, whether or not others fail; return those that did."""
    failed = []
    for subscriber in subscribers:
        try:
            subscriber(*arguments)
        except Exception:
            _log.exception("A subscriber failed")
            failed.append(subscriber)
    return failed


#: The fields of a row whose change is worth a write.
_stored = operator.attrgetter(
    *sorted({item.name for item in dataclasses.fields(AgentRow)} - {"observed_at", "last_used", "version"})
)
