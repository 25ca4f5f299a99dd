"""Keeping what is stored and what is so together.  Asks providers, in their pools' threads.

At boot and then regularly each backend lists its agents in one call (`sweep`): what runs is adopted, what was
interrupted is finished, what died and should run is started again, and what carries this installation's label
and is unknown is removed.  In between a provider's events and the edge's suspicions are looked at one agent at
a time (`observe`).  A backend that cannot be asked changes nothing but that it is *unreachable*.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from dispatcher.manager.agents import transitions
from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.lifecycle import ALIVE, backoff, reached, recent
from dispatcher.manager.agents.operations import Operations
from dispatcher.manager.agents.readiness import OBSERVE, refuses
from dispatcher.manager.agents.registry import Change, Engine
from dispatcher.manager.backends.backend import Backend, hanging
from dispatcher.manager.storage.agents import AgentRow, BackendRow
from dispatcher.plugin import names
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, Unavailable
from dispatcher.plugin.model import BackendState, Handle, Observation
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import no_progress

DESTROY = 300.0  # seconds to remove something unknown
LIST_TIME = 30.0  # seconds for the list of all agents
ENDING = (0.02, 0.1, 0.3)  # seconds between looks at an agent that refuses connections
SUSPECT = 0.25  # seconds between looks at one agent that the edge could not reach

_log = logging.getLogger("dispatcher.manager")


class Reconciler:
    """Observes, and lets `Engine` decide.

    :ivar host_restarted: this manager is the first one after a boot of the host.
    """

    def __init__(self, engine: Engine, operations: Operations) -> None:
        self._engine = engine
        self._operations = operations
        self._lock = threading.Lock()
        self.host_restarted = False
        operations.asked = self.kick
        operations.nudged = self.observe

    # --- whole backends

    def kick(self, backend: Backend, *, done: Callable[[], None] | None = None) -> None:
        """List a backend's agents soon; once more when that is being done already.

        :param done: called when it was done.
        """
        with self._lock:
            if backend.listing:
                backend.listing = 2
                return
            backend.listing = 1
        hung = threading.Event()

        def run() -> None:
            try:
                self._sweep(backend)
            finally:
                with self._lock:
                    again = backend.listing == 2 or hung.is_set()
                    backend.listing = 0
                if done:
                    done()
                if again:
                    self.kick(backend)

        def overdue(_: object) -> None:
            hung.set()
            self._lost(backend, hanging(backend.name, "list"))

        if backend.usable:
            backend.pool.submit(run, overdue=overdue)
        else:
            self._lost(backend, backend.problem)
            backend.listing = 0
            if done:
                done()

    def _ask_again(self, backend: Backend) -> None:
        """Ask a backend that is away sooner than the next regular time: after 1, 2, 4, ... seconds."""
        if backend.asking:
            return
        backend.asking, backend.losses = True, backend.losses + 1

        def ask() -> None:
            backend.asking = False
            self.kick(backend)

        interval = self._engine.specs.config.manager.reconcile_interval
        self._engine.timers.after(min(interval, backoff(backend.losses)), ask)

    def _sweep(self, backend: Backend) -> None:
        engine = self._engine
        known = [(agent, agent.epoch) for agent in engine.of_provider(backend.name)]
        try:
            listed = backend.guard.list(deadline=Deadline(LIST_TIME))
        except DispatcherError as error:
            self._lost(backend, error)
            self._ask_again(backend)
            return
        backend.losses = 0
        first = not backend.answered
        backend.answered = True
        self._answered(backend)
        found = {handle.agent: (handle, seen) for handle, seen in listed}
        for agent, epoch in known:
            handle, seen = found.get(agent.row.name, (None, _ABSENT))
            row = agent.row
            settled = not first and row.failure is None and transitions.same(row, seen)
            if settled and reached(engine.situation(row)):
                continue
            if agent.operation is None and agent.epoch == epoch:
                self._apply(agent, epoch, seen, handle=handle, first=first, bulk=True)
        for handle, _ in found.values():
            self._check_unknown(backend, handle)
        engine.flush()

    def _answered(self, backend: Backend) -> None:
        engine = self._engine
        backend.contact = engine.clock.now()
        if backend.reachable:
            return
        first = backend.since is None
        backend.reachable, backend.since = True, backend.contact
        self._remember(backend)
        if not first:
            _log.warning("The backend of %s answers again", backend.name)
        for agent in engine.of_provider(backend.name):

            def back(row: AgentRow) -> Change:
                fields = {"retry_at": engine.clock.now()} if row.failure and row.retry_at is not None else {}
                events = [("reachable", "")] if not first and row.observed in ALIVE else []
                return Change(fields, events, defer=True)

            engine.change(agent, back if not first else lambda _: Change(defer=True))

    def _lost(self, backend: Backend, error: DispatcherError) -> None:
        engine = self._engine
        backend.problem = error
        if not backend.reachable and backend.since is not None:
            return
        _log.error("The backend of %s cannot be asked: %s", backend.name, error)
        backend.reachable, backend.since = False, engine.clock.now()
        self._remember(backend)
        for agent in engine.of_provider(backend.name):

            def away(row: AgentRow) -> Change:
                return Change({}, [("unreachable", str(error))] if row.observed in ALIVE else [], defer=True)

            engine.change(agent, away)
        engine.flush()

    def remember(self) -> None:
        """Write down when each backend last answered."""
        for backend in self._engine.backends:
            if backend.since is not None:
                self._remember(backend)

    def _remember(self, backend: Backend) -> None:
        try:
            self._engine.store.save_backend(
                BackendRow(
                    name=backend.name,
                    reachable=backend.reachable,
                    since=backend.since or 0.0,
                    contact=backend.contact,
                )
            )
        except DispatcherError as error:
            _log.error("%s: %s", backend.name, error)

    # --- one agent

    def observe(self, agent: Agent, *, connect: bool = False) -> None:
        """Ask the backend about one agent soon; at once again when asked for meanwhile.

        :param connect: also see whether somebody listens at its endpoint.
        """
        operation = agent.operation
        if operation is not None:
            operation.nudged = True
            return
        with self._lock:
            if agent.observing:
                agent.observing = 2
                return
            agent.observing = 1
        backend = self._engine.backends.get(agent.row.provider)

        def run() -> None:
            again = True
            while again:
                try:
                    self._observe(agent, backend, connect=connect)
                finally:
                    with self._lock:
                        again = agent.observing == 2
                        agent.observing = 1 if again else 0

        backend.pool.submit(run)

    def changed(self, backend: Backend, backend_name: str) -> None:
        """Take a provider's event: the agent of that handle name changed, or everything may have."""
        agent = self._engine.by_backend_name.get(backend_name)
        if agent is not None:
            self.observe(agent)
        elif not backend_name:
            self.kick(backend)

    def suspect(self, agent: Agent) -> None:
        """Take the edge's word that nobody listens at the agent's endpoint."""
        if agent.operation is None and agent.quiet(SUSPECT):
            self.observe(agent, connect=True)

    def _observe(self, agent: Agent, backend: Backend, *, connect: bool) -> None:
        epoch, handle = agent.epoch, agent.handle
        if handle is None or agent.operation is not None:
            return
        try:
            seen = backend.guard.observe(handle, deadline=Deadline(OBSERVE))
        except Unavailable:
            self.kick(backend)
            return
        except DispatcherError as error:
            _log.warning("%s: %s", printable(agent.row.name), error)
            return
        self._apply(agent, epoch, seen)
        if connect:
            self._check_listener(agent, epoch, backend, seen)

    def _check_listener(self, agent: Agent, epoch: int, backend: Backend, seen: Observation) -> None:
        """An agent that runs and at whose endpoint nobody listens is not ready any more.

        One that is just ending refuses connections, too: its end is awaited for a moment, as it has a reason.
        """
        handle = agent.handle
        for pause in ENDING:
            if handle is None or seen.state is not BackendState.RUNNING or seen.endpoint is None:
                return
            if not refuses(seen.endpoint, seen.owner_uid):
                return
            time.sleep(pause)
            try:
                seen = backend.guard.observe(handle, deadline=Deadline(OBSERVE))
            except DispatcherError:
                return
            self._apply(agent, epoch, seen)
        if seen.state is not BackendState.RUNNING:
            return

        def deaf(row: AgentRow) -> Change | None:
            if agent.epoch != epoch or not self._engine.served(row):
                return None
            return Change(
                {"ready": False}, [("unreachable", "it runs, and does not listen any more")], urgent=True
            )

        self._engine.change(agent, deaf)

    def _apply(
        self,
        agent: Agent,
        epoch: int,
        seen: Observation,
        *,
        handle: Handle | None = None,
        first: bool = False,
        bulk: bool = False,
    ) -> None:
        engine, row = self._engine, agent.row
        policy = engine.specs.policy(row.app)
        log: list[str] = []
        if transitions.died(row, seen):
            tries = len(recent(row.attempts, engine.clock.now()))
            if tries >= policy.max_restarts or (tries and not bulk):  # else it is started again at once
                log = self._operations.last_lines(agent)

        def decide(row: AgentRow) -> Change | None:
            if agent.epoch != epoch or agent.operation is not None or agent.stuck:
                return None
            change = transitions.noticed(
                row,
                seen,
                now=engine.clock.now(),
                policy=policy,
                log=log,
                host_restarted=first and self.host_restarted,
            )
            change = change or Change()
            events = list(change.events)
            fields = dict(change.fields)
            if first and seen.state in ALIVE:
                events.append(("adopted", f"it is {seen.state.value}"))
            if handle is not None and not row.handle:
                fields["handle"] = handle.to_json()
            return Change(fields, events, defer=bulk, urgent=not bulk)

        engine.change(agent, decide)

    # --- what is unknown

    def _check_unknown(self, backend: Backend, handle: Handle) -> None:
        """Remove what carries our label and belongs to nobody we know; its data stays with the provider."""
        if names.backend_name(self._engine.installation, handle.agent) != handle.name:
            _log.warning("%s lists %s, which is not ours", backend.name, printable(handle.name))
        elif self._is_unknown(backend, handle):
            backend.pool.submit(lambda: self._destroy_unknown(backend, handle), urgent=False)

    def _is_unknown(self, backend: Backend, handle: Handle) -> bool:
        agent = self._engine.agents.get(handle.agent)
        return agent is None or (agent.row.provider != backend.name and agent.row.move is None)

    def _destroy_unknown(self, backend: Backend, handle: Handle) -> None:
        with self._engine.claimed(handle.agent) as free:
            if not free or not self._is_unknown(backend, handle):
                return
            _log.warning("%s has %s, which nobody knows: it is removed", backend.name, printable(handle.name))
            try:
                backend.guard.destroy(handle, data=False, deadline=Deadline(DESTROY), progress=no_progress)
            except DispatcherError as error:
                _log.warning("%s cannot be removed from %s: %s", printable(handle.name), backend.name, error)


_ABSENT = Observation(state=BackendState.ABSENT)
