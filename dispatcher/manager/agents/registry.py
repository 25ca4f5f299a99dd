"""The heart: changes an agent's row, decides what follows, writes it down, and only then lets it be done.

Every change goes through `Engine.change` or `Engine.finish`: under the agent's lock the new row and the next
operation are computed (`lifecycle`), written in one transaction, and made visible; afterwards those who wait
and those who subscribed are told.  Touches the store; asks no provider anything but `handle`, which is pure.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dispatcher.common.log import clean
from dispatcher.manager.agents.agent import Agent, Operation
from dispatcher.manager.agents.lifecycle import (
    ASLEEP,
    Desired,
    Kind,
    Pending,
    Situation,
    feed_state,
    next_operation,
    public_state,
    reached,
    superseded,
)
from dispatcher.manager.agents.observers import History
from dispatcher.manager.agents.specs import Specs
from dispatcher.manager.agents.timers import Timers
from dispatcher.manager.agents.views import AgentView, view_of
from dispatcher.manager.backends.backend import Backends
from dispatcher.manager.storage.agents import AgentRow, Store
from dispatcher.manager.storage.write_buffer import Backlog
from dispatcher.plugin import names
from dispatcher.plugin.deadline import SteadyWallClock, boottime
from dispatcher.plugin.errors import DispatcherError, NotFound
from dispatcher.plugin.model import AgentEvent
from dispatcher.plugin.provider import Progress

TELL = 0.25  # seconds between announcements of mere progress
WRITE_STEP = 2.0  # seconds after which the step of a long operation is written down
RETRY_WRITE = 1.0  # seconds after which a failed write is tried again

_log = logging.getLogger("dispatcher.manager")


@dataclass(frozen=True, slots=True)
class Change:
    """What shall become of an agent.

    :ivar fields: of its row; :ivar events: kinds with details.
    :ivar strict: nothing happens, and the error is raised, when it cannot be written: for intents.
    :ivar insist: try even though the backend was unreachable when last asked.
    :ivar defer: write later, with others, unless an operation begins.
    :ivar urgent: a person waits for what follows.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    events: Sequence[tuple[str, str]] = ()
    strict: bool = False
    insist: bool = False
    defer: bool = False
    urgent: bool = False


Decide = Callable[[AgentRow], "Change | None"]


class Engine:
    """All agents of the installation.

    :ivar submit: runs an operation (set by `operations`); :ivar on_step: told of every step of every operation
        before it is done: ``(agent, kind, step)``.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: SteadyWallClock,
        specs: Specs,
        backends: Backends,
        history: History,
        timers: Timers,
        installation: str,
    ) -> None:
        self.store = store
        self.clock = clock
        self.specs = specs
        self.backends = backends
        self.history = history
        self.timers = timers
        self.installation = installation
        self.agents: dict[str, Agent] = {}
        self.by_backend_name: dict[str, Agent] = {}
        self._registry = threading.Lock()
        self._claims: set[str] = set()
        self.submit: Callable[[Agent, Operation, bool], None] = lambda _agent, _operation, _urgent: None
        self.on_step: Callable[[str, Kind, str], None] = lambda _agent, _kind, _step: None
        self._subscribers: list[Callable[[str], None]] = []
        self.backlog = Backlog(store)

    # --- who there is

    def find(self, name: str) -> Agent:
        """Return an agent.

        :raises NotFound: there is none of that name.
        """
        agent = self.agents.get(name)
        if agent is None:
            raise NotFound(
                f"There is no agent {names.printable(name)}", fix="`dispatcher list` shows those there are"
            )
        return agent

    def add(self, row: AgentRow) -> Agent:
        """Take an agent that is in the store into memory."""
        agent = Agent(row)
        agent.state = public_state(self.situation(row, insist=True))
        with self._registry:
            self.agents[row.name] = agent
            self.by_backend_name[names.backend_name(self.installation, row.name)] = agent
        return agent

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Keep a name, inside the block, for a new agent or for removing what nobody knows; False: it is taken."""
        with self._registry:
            free = name not in self._claims
            self._claims.add(name)
        try:
            yield free
        finally:
            if free:
                with self._registry:
                    self._claims.discard(name)

    def recovered(self, row: AgentRow, *, host_restarted: bool) -> AgentRow:
        """Return a row as a new manager begins with it: nothing is in flight, and a new boot is a new chance."""
        if row.operation is not None:
            row = dataclasses.replace(row, operation=None, step="", operation_since=None, version=row.version + 1)
        if host_restarted:
            row = dataclasses.replace(row, attempts=(), version=row.version + 1)
            if row.failure is not None and row.desired is Desired.RUNNING:
                row = dataclasses.replace(row, retry_at=self.clock.now())
        return row

    def forget(self, agent: Agent) -> None:
        """Drop an agent that is no longer in the store."""
        with self._registry:
            if self.agents.get(agent.row.name) is agent:
                del self.agents[agent.row.name]
                del self.by_backend_name[names.backend_name(self.installation, agent.row.name)]
        with agent.lock:
            agent.gone = True
            agent.operation = None
            agent.changed.notify_all()
        self.announce(agent)

    def of_provider(self, provider: str) -> list[Agent]:
        """Return the agents that a provider has now."""
        return [agent for agent in list(self.agents.values()) if agent.row.provider == provider]

    def view(self, agent: Agent) -> AgentView:
        """Return an agent as it is; takes no lock."""
        row, operation = agent.row, agent.operation
        backend = self.backends.get(row.provider)
        return view_of(
            row,
            self.situation(row),
            stage=(operation.stage, operation.detail, operation.fraction) if operation else ("", "", None),
            outdated=self.specs.outdated(row),
            last_used=agent.last_used,
            contact=backend.contact,
            problem=str(backend.problem),
            now=self.clock.now(),
        )

    def subscribe(self, on_change: Callable[[str], None]) -> None:
        """Call `on_change(name)` after every change."""
        self._subscribers.append(on_change)

    def announce(self, agent: Agent) -> None:
        """Tell subscribers that an agent changed.  Never called while its lock is held."""
        for subscriber in self._subscribers:
            try:
                subscriber(agent.row.name)
            except Exception:
                _log.exception("A subscriber failed")

    # --- changes

    def situation(self, row: AgentRow, *, insist: bool = False) -> Situation:
        """Return all that decides about an agent."""
        held = row.failure is not None and (row.retry_at is None or self.clock.now() < row.retry_at)
        return Situation(
            desired=row.desired,
            observed=row.observed,
            ready=row.ready,
            reachable=insist or self.backends.get(row.provider).reachable,
            operation=row.operation,
            pending=row.pending,
            moving=row.move is not None or self.specs.provider(row) != row.provider,
            failed=row.failure is not None,
            held=held,
        )

    def served(self, row: AgentRow) -> bool:
        """Whether requests go to the agent now."""
        return feed_state(self.situation(row)) == "running"

    def change(self, agent: Agent, decide: Decide) -> bool:
        """Change an agent as `decide(row)` says; return whether it wanted a change.

        :raises Unavailable: the change is strict and cannot be written; nothing happened then.
        """
        with agent.lock:
            if agent.gone:
                return False
            change = decide(agent.row)
            if change is None:
                return False
            before = agent.row
            operation = self._settle(agent, change)
            changed = agent.row is not before
            if changed:
                agent.changed.notify_all()
        if changed:
            self.announce(agent)
        if operation:
            self.submit(agent, operation, change.urgent)
        return True

    def poke(self, agent: Agent) -> None:
        """See whether something is to be done now."""
        self.change(agent, lambda _: Change())

    def finish(self, agent: Agent, operation: Operation, change: Change) -> Operation | None:
        """End an operation with its result; return the next one, for the same thread to run.

        An abandoned operation has no result any more: the caller observes the agent instead.
        """
        with agent.lock:
            if operation.abandoned or agent.operation is not operation:
                return None
            agent.operation = None
            agent.epoch += 1
            fields = {**change.fields, "operation": None, "step": "", "operation_since": None}
            if operation.cancel.is_set():  # how it failed is of no interest to the newer intent
                for name in ("failure", "retry_at", "attempts"):
                    fields.pop(name, None)
            following = self._settle(agent, dataclasses.replace(change, fields=fields))
            agent.changed.notify_all()
        self.announce(agent)
        return following

    def update(self, agent: Agent, operation: Operation, **fields: Any) -> None:
        """Write fields in the middle of an operation, before it goes on.

        :raises Unavailable: they cannot be written.
        :raises Cancelled: the operation is no longer the agent's.
        """
        with agent.lock:
            operation.check()
            self._settle(agent, Change(fields, strict=True))

    def _settle(self, agent: Agent, change: Change) -> Operation | None:
        before = agent.row
        row = dataclasses.replace(before, **change.fields) if change.fields else before
        happened = list(change.events)
        operation: Operation | None = None
        if row.failure is not None and reached(self.situation(row)):
            row = dataclasses.replace(row, failure=None, retry_at=None)
        if agent.operation is None and not (agent.stuck or agent.busy):
            kind = next_operation(self.situation(row, insist=change.insist))
            if kind is not None:
                operation = Operation(kind, self.clock.now())
                idle, plain_events = row, list(happened)
                row = self._begin(agent, row, operation, happened)
        state = public_state(self.situation(row))
        if state is not agent.state:
            row = dataclasses.replace(row, since=self.clock.now())
        if row == before and not happened:
            return None
        row = dataclasses.replace(row, version=before.version + 1, last_used=agent.last_used)
        events = [(row.id, self.event(row, kind, detail)) for kind, detail in happened]
        if change.defer and operation is None:
            self.backlog.add(agent, events)
        elif events or agent.dirty or _stored(row) != _stored(before):
            try:
                self.store.save([row], events)
            except DispatcherError as error:
                if change.strict:
                    raise
                _log.error("%s: %s", names.printable(row.name), error)
                if operation is not None:  # what cannot be written is not begun
                    operation = None
                    row = dataclasses.replace(idle, version=row.version)
                    events = [(row.id, self.event(row, kind, detail)) for kind, detail in plain_events]
                self.backlog.add(agent, events)
        agent.row = row
        agent.state = public_state(self.situation(row))
        if operation is not None:
            agent.operation = operation
            agent.epoch += 1
        elif agent.operation is not None and superseded(agent.operation.kind, row.desired, row.pending):
            agent.operation.cancel.set()
        if row.retry_at is not None and row.retry_at != before.retry_at:
            self.timers.after(row.retry_at - self.clock.now() + 0.001, lambda: self.poke(agent))
        if events:
            self.history.tell(event for _, event in events)
        return operation

    def _begin(
        self, agent: Agent, row: AgentRow, operation: Operation, happened: list[tuple[str, str]]
    ) -> AgentRow:
        fields: dict[str, Any] = {"operation": operation.kind, "step": "", "operation_since": operation.since}
        if operation.kind in {Kind.START, Kind.MOVE}:
            fields["ready"] = False
            if row.pending is Pending.RESTART:
                fields["pending"] = Pending.NONE
            if row.observed not in ASLEEP:
                happened.append(("starting", ""))
            if not row.handle and operation.kind is Kind.START:
                fields["handle"] = self._planned_handle(row)
        elif operation.kind is Kind.STOP:
            happened.append(("stopping", ""))
        return dataclasses.replace(row, **fields)

    def _planned_handle(self, row: AgentRow) -> str:
        """Return the handle that the agent will have, "" when that cannot be said: the start will say why."""
        try:
            guard = self.backends.get(row.provider).guard
            return guard.handle(self.specs.spec(row)).to_json()
        except DispatcherError:
            return ""

    def flush(self) -> None:
        """Write what was put off, and go on where a write had failed."""
        for agent in self.backlog.flush(list(self.agents.values())):
            if agent.operation is None and next_operation(self.situation(agent.row)) is not None:
                self.poke(agent)

    def write_last_used(self) -> None:
        """Write when agents were last used, where that changed."""
        for agent in list(self.agents.values()):
            if agent.last_used != agent.row.last_used:
                with agent.lock:
                    row, agent.dirty = agent.row, True
                    agent.row = dataclasses.replace(row, version=row.version + 1, last_used=agent.last_used)
        self.flush()

    # --- words

    def event(self, row: AgentRow, kind: str, detail: str = "") -> AgentEvent:
        """Return something that happened now."""
        return AgentEvent(
            time=self.clock.now(),
            agent=row.name,
            user=row.user,
            app=row.app,
            kind=kind,
            detail=clean(detail, 1000) if detail else "",
        )

    def progress(self, agent: Agent, operation: Operation) -> Progress:
        """Return the function by which an operation tells how far it is, and learns that it was cancelled."""

        def tell(step: str, detail: str = "", fraction: float | None = None) -> None:
            operation.check()
            now = (clean(str(step), 64), clean(str(detail), 300), _fraction(fraction))
            if now == operation.shown:
                return
            new_stage = now[0] != operation.stage
            operation.stage, operation.detail, operation.fraction = now
            if new_stage or boottime() - operation.told > TELL:
                operation.told, operation.shown = boottime(), now
                self._tell_progress(agent, operation)

        return tell

    def step(self, agent: Agent, operation: Operation, step: str) -> None:
        """Go to the next step of an operation.

        :raises Cancelled: a newer intent contradicts the operation.
        """
        self.on_step(agent.row.name, operation.kind, step)
        self.progress(agent, operation)(step)

    def _tell_progress(self, agent: Agent, operation: Operation) -> None:
        with agent.lock:
            if agent.operation is not operation:
                return
            if self.clock.now() - operation.since > WRITE_STEP and agent.row.step != operation.stage:
                self._settle(agent, Change({"step": operation.stage}, defer=True))
        self.announce(agent)


#: What of a row is worth a write when it changes.
_stored = operator.attrgetter(
    *(
        name
        for name in (item.name for item in dataclasses.fields(AgentRow))
        if name not in {"observed_at", "last_used", "version"}
    )
)


def _fraction(value: object) -> float | None:
    return min(1.0, max(0.0, float(value))) if isinstance(value, (int, float)) and value == value else None  # noqa: PLR0124 - not a NaN
