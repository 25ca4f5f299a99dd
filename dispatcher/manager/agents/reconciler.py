"""Reconciles the stored agents with those on the backends.  Calls providers, in their pools' threads.

At boot and then regularly each backend lists its agents in one call (`sweep`): running agents are adopted,
interrupted operations are finished, agents that died are started again, and agents with this installation's label
that are unknown are removed.  In between, single agents are observed after a provider's event or a failed
connection of the edge (`observe`).  A backend that does not answer is *unreachable*; nothing else changes.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from dispatcher.common.humanize import size
from dispatcher.manager.agents import restarts
from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.lifecycle import ALIVE, Change, EventKind, Write, reached, unchanged
from dispatcher.manager.agents.operations.readiness import OBSERVE, refuses
from dispatcher.manager.agents.operations.runner import Runner
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.agents.restarts import backoff, recent
from dispatcher.manager.backends.backend import Backend, Contact
from dispatcher.manager.backends.logs import last_lines
from dispatcher.manager.backends.pool import hung_call
from dispatcher.manager.storage.rows import AgentRow, BackendRow
from dispatcher.plugin import names
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, Unavailable
from dispatcher.plugin.model import BackendState, Handle, Observation
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import no_progress

DESTROY = 300.0  # seconds to remove an unknown agent
LIST_TIME = 30.0  # seconds for the list of all agents
ENDING = (0.02, 0.1, 0.3)  # seconds between observations of an agent that refuses connections
CHECK_INTERVAL = 0.25  # seconds between checks of one agent's endpoint

NOTICE = 600.0  # seconds for which an agent's page says that processes were killed

_ABSENT = Observation(state=BackendState.ABSENT)
_log = logging.getLogger("dispatcher.manager")


class Reconciler:
    """Observes; `lifecycle` and `restarts` decide.

    :ivar host_restarted: this manager is the first one after a boot of the host.
    """

    def __init__(self, registry: Registry, operations: Runner) -> None:
        self._registry = registry
        self.host_restarted = False
        operations.on_unavailable = self.sweep_soon
        operations.on_changed = self.observe

    # --- whole backends

    def sweep_soon(self, backend: Backend, *, done: Callable[[], None] = lambda: None) -> None:
        """List a backend's agents soon; once more if that is in progress.

        :param done: called afterwards.
        """
        if not backend.usable:
            self._lost(backend, backend.problem)
            done()
            return
        if not backend.listing.begin():
            return
        hung = threading.Event()

        def run() -> None:
            try:
                self._sweep(backend)
            finally:
                again = backend.listing.end()
                done()
                if again or hung.is_set():
                    self.sweep_soon(backend)

        def overdue(_: object) -> None:
            hung.set()
            self._lost(backend, hung_call(backend.plugin, "list"))

        backend.pool.submit(run, overdue=overdue)

    def _retry(self, backend: Backend) -> None:
        """Call a backend again before the next regular sweep: after 1, 2, 4, ... seconds."""
        if not backend.retry.begin():
            return
        backend.losses += 1

        def run() -> None:
            backend.retry.end()
            self.sweep_soon(backend)

        interval = self._registry.specs.config.manager.reconcile_interval
        self._registry.timers.after(min(interval, backoff(backend.losses)), run)

    def _sweep(self, backend: Backend) -> None:
        registry = self._registry
        known = [(agent, agent.epoch) for agent in registry.of_provider(backend.name)]
        try:
            listed = backend.provider.list(deadline=Deadline(LIST_TIME))
        except DispatcherError as error:
            self._lost(backend, error)
            self._retry(backend)
            return
        backend.losses = 0
        first = backend.contact in {Contact.NOT_CALLED, Contact.NEVER_ANSWERED}
        self._answered(backend)
        found = {handle.agent: (handle, seen) for handle, seen in listed}
        for agent, epoch in known:
            handle, seen = found.get(agent.row.name, (None, _ABSENT))
            row = agent.row
            quiet = (
                not first
                and seen.oom_kills == (agent.oom_kills or 0)
                and row.failure is None
                and unchanged(row, seen)
            )
            if quiet and reached(registry.situation(row)):
                continue
            if agent.operation is None and agent.epoch == epoch:
                self._apply(agent, epoch, seen, handle=handle, first=first, bulk=True)
        for handle, _ in found.values():
            self._check_unknown(backend, handle)
        registry.flush()

    def _answered(self, backend: Backend) -> None:
        backend.last_contact = self._registry.clock.now()
        if backend.reachable:
            return
        again = backend.contact is not Contact.NOT_CALLED
        self._set_contact(backend, Contact.ANSWERS)
        if again:
            _log.warning("The backend of %s answers again", backend.name)
        self._report(backend, EventKind.REACHABLE if again else None)

    def _lost(self, backend: Backend, error: DispatcherError) -> None:
        backend.problem = error
        if backend.contact in {Contact.LOST, Contact.NEVER_ANSWERED}:
            return
        _log.error("The backend of %s does not answer: %s", backend.name, error)
        self._set_contact(backend, Contact.LOST if backend.reachable else Contact.NEVER_ANSWERED)
        self._report(backend, EventKind.UNREACHABLE, str(error))
        self._registry.flush()

    def _report(self, backend: Backend, event: EventKind | None, detail: str = "") -> None:
        """Report that a backend answers, or not, to its agents: what was held back is tried again."""

        def decide(row: AgentRow) -> Change:
            retry = event is EventKind.REACHABLE and row.failure is not None and row.retry_at is not None
            return Change(
                {"retry_at": self._registry.clock.now()} if retry else {},
                [(event, detail)] if event and row.observed in ALIVE else [],
                write=Write.LATER,
            )

        for agent in self._registry.of_provider(backend.name):
            self._registry.change(agent, decide)

    def _set_contact(self, backend: Backend, contact: Contact) -> None:
        backend.contact, backend.since = contact, self._registry.clock.now()
        self._save(backend)

    def save(self) -> None:
        """Write when each backend last answered."""
        for backend in self._registry.backends:
            if backend.since is not None:
                self._save(backend)

    def _save(self, backend: Backend) -> None:
        row = BackendRow(
            name=backend.name,
            reachable=backend.reachable,
            since=backend.since or 0.0,
            contact=backend.last_contact,
        )
        try:
            self._registry.store.save_backend(row)
        except DispatcherError as error:
            _log.error("%s: %s", backend.name, error)

    # --- one agent

    def observe(self, agent: Agent, *, connect: bool = False) -> None:
        """Observe one agent soon; once more if that is in progress.

        :param connect: also check whether its endpoint accepts connections.
        """
        operation = agent.operation
        if operation is not None:
            operation.observe_again = True
            return
        if not agent.observing.begin():
            return
        backend = self._registry.backends.get(agent.row.provider)

        def run() -> None:
            try:
                self._observe(agent, backend, connect=connect)
            finally:
                if agent.observing.end():
                    self.observe(agent, connect=connect)

        backend.pool.submit(run)

    def on_event(self, backend: Backend, backend_name: str) -> None:
        """Handle a provider's event: the agent of that handle name changed; "": any agent may have."""
        agent = self._registry.by_backend_name.get(backend_name)
        if agent is not None:
            self.observe(agent)
        elif not backend_name:
            self.sweep_soon(backend)

    def check_endpoint(self, name: str) -> None:
        """The edge could not connect to an agent: observe it.  Unknown agents are ignored."""
        agent = self._registry.agents.get(name)
        if agent is not None and agent.operation is None and agent.may_check(CHECK_INTERVAL):
            self.observe(agent, connect=True)

    def _observe(self, agent: Agent, backend: Backend, *, connect: bool) -> None:
        epoch, handle = agent.epoch, agent.handle
        if handle is None or agent.operation is not None:
            return
        try:
            seen = backend.provider.observe(handle, deadline=Deadline(OBSERVE))
        except Unavailable:
            self.sweep_soon(backend)
            return
        except DispatcherError as error:
            _log.warning("%s: %s", printable(agent.row.name), error)
            return
        self._apply(agent, epoch, seen)
        if connect:
            self._check_listener(agent, epoch, backend, seen)

    def _check_listener(self, agent: Agent, epoch: int, backend: Backend, seen: Observation) -> None:
        """A running agent whose endpoint refuses connections is no longer ready.

        An agent that is just ending refuses connections, too: its end, which has a reason, is awaited for a
        moment.
        """
        handle = agent.handle
        for pause in ENDING:
            if handle is None or seen.state is not BackendState.RUNNING or seen.endpoint is None:
                return
            if not refuses(seen.endpoint, seen.owner_uid):
                return
            time.sleep(pause)
            try:
                seen = backend.provider.observe(handle, deadline=Deadline(OBSERVE))
            except DispatcherError:
                return
            self._apply(agent, epoch, seen)
        if seen.state is not BackendState.RUNNING:
            return

        def decide(row: AgentRow) -> Change | None:
            if agent.epoch != epoch or not self._registry.is_served(row):
                return None
            events = [(EventKind.UNREACHABLE, "it runs, but its endpoint refuses connections")]
            return Change({"ready": False}, events, urgent=True)

        self._registry.change(agent, decide)

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
        registry, row = self._registry, agent.row
        policy = registry.specs.policy(row.app)
        log: list[str] = []
        if restarts.died(row, seen):
            if agent.killed_because:
                seen = dataclasses.replace(seen, exit_reason=agent.killed_because)
            disk = registry.measure(agent)
            if disk and disk.full:
                why = f"{seen.exit_reason or 'reason unknown'}; its data is full: {disk}"
                seen = dataclasses.replace(seen, exit_reason=why)
            tries = len(recent(row.attempts, registry.clock.now()))
            if tries >= policy.max_restarts or (tries and not bulk):  # else it is started again at once
                log = last_lines(registry.backends.get(row.provider), agent.handle, restarts.LOG_LINES)

        def decide(row: AgentRow) -> Change | None:
            if agent.epoch != epoch or agent.operation is not None or agent.stuck:
                return None
            restarted = first and self.host_restarted
            change = restarts.noticed(
                row, seen, now=registry.clock.now(), policy=policy, log=log, host_restarted=restarted
            )
            events, fields = (list(change.events), dict(change.fields)) if change else ([], {})
            events += self._killed(agent, seen)
            if first and seen.state in ALIVE:
                events.append((EventKind.ADOPTED, f"it is {seen.state.value}"))
            if handle is not None and not row.handle:
                fields["handle"] = handle.to_json()
            return Change(fields, events, write=Write.LATER if bulk else Write.NOW, urgent=not bulk)

        registry.change(agent, decide)

    def _killed(self, agent: Agent, seen: Observation) -> list[tuple[EventKind, str]]:
        """Report processes that the kernel killed for memory while the app itself went on."""
        before, agent.oom_kills = agent.oom_kills, seen.oom_kills
        if before is None or seen.oom_kills <= before or seen.state not in ALIVE:
            return []
        killed = seen.oom_kills - before
        limit = self._registry.specs.policy(agent.row.app).limits().memory
        bound = f", as its memory reached its limit of {size(limit)}" if limit else ", as memory was used up"
        detail = f"the kernel killed {killed} of its processes{bound}"
        agent.notice = detail, self._registry.clock.now() + NOTICE
        return [(EventKind.OUT_OF_MEMORY, detail)]

    # --- unknown agents

    def _check_unknown(self, backend: Backend, handle: Handle) -> None:
        """Remove an agent that has our label and is not in the store; its data stays with the provider."""
        if names.backend_name(self._registry.installation, handle.agent) != handle.name:
            _log.warning("%s lists %s, which is not of this installation", backend.name, printable(handle.name))
        elif self._is_unknown(backend, handle):
            backend.pool.submit(lambda: self._destroy_unknown(backend, handle), urgent=False)

    def _is_unknown(self, backend: Backend, handle: Handle) -> bool:
        agent = self._registry.agents.get(handle.agent)
        return agent is None or (agent.row.provider != backend.name and agent.row.move is None)

    def _destroy_unknown(self, backend: Backend, handle: Handle) -> None:
        with self._registry.name_reserved(handle.agent) as free:
            if not free or not self._is_unknown(backend, handle):
                return
            _log.warning("%s has the unknown agent %s: removing it", backend.name, printable(handle.name))
            try:
                backend.provider.destroy(handle, data=False, deadline=Deadline(DESTROY), progress=no_progress)
            except DispatcherError as error:
                _log.warning("%s cannot be removed from %s: %s", printable(handle.name), backend.name, error)
