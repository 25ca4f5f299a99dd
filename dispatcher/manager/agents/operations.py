"""Runs operations on agents, step by step, in a thread of the provider's pool.

Each step is written or idempotent, so that a manager that is killed at any point and started again continues: the
reconciler observes, `lifecycle` decides, and the same operation runs again from its beginning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.agents import transitions
from dispatcher.manager.agents.agent import Agent, Availability
from dispatcher.manager.agents.change import Change, EventKind
from dispatcher.manager.agents.copies import Copies
from dispatcher.manager.agents.lifecycle import ASLEEP, DEAD
from dispatcher.manager.agents.migration import Migrator
from dispatcher.manager.agents.operation import Operation, Status
from dispatcher.manager.agents.readiness import OBSERVE, Probe, await_ready
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.agents.transitions import CLEARED, ENDED, LOG_LINES, NO_OPERATION
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.backends.logs import last_lines
from dispatcher.manager.backends.pool import Job, hung_call
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.rows import AgentRow, Failure, KeptRow
from dispatcher.manager.storage.states import Desired, Kind, Pending
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import (
    Cancelled,
    Conflict,
    DispatcherError,
    NotFound,
    ProviderError,
    SpecConflict,
    StartFailed,
)
from dispatcher.plugin.model import BackendState, Depth, Handle, Observation
from dispatcher.plugin.names import printable

STOP_SLACK = 30.0  # seconds beyond the grace time
SUSPEND_TIME = 60.0
HIBERNATE_TIME = 600.0  # seconds; a guest's memory goes to disk
DESTROY_TIME = 300.0
WAITING = "waiting for the app"

_log = logging.getLogger("dispatcher.manager")


class Operations:
    """Runs operations.

    :ivar on_unavailable: called with a backend that did not answer.
    :ivar on_changed: called with an agent of which the backend reported a change that was not observed yet.
    """

    def __init__(
        self, registry: Registry, data: AgentData, migrator: Migrator, copies: Copies, accounts: HostAccounts
    ) -> None:
        self._registry = registry
        self._data = data
        self._proxy_gid = accounts.proxy_gid if accounts.agent_uids is not None else None
        self._migrator = migrator
        self._copies = copies
        self.on_unavailable: Callable[[Backend], None] = lambda _backend: None
        self.on_changed: Callable[[Agent], None] = lambda _agent: None
        self._steps: dict[Kind, Callable[[Agent, Operation], Change | None]] = {
            Kind.START: self._start,
            Kind.SUSPEND: lambda agent, operation: self._suspend(agent, operation, Depth.RAM),
            Kind.HIBERNATE: lambda agent, operation: self._suspend(agent, operation, Depth.DISK),
            Kind.STOP: self._stop,
            Kind.RESET: self._reset,
            Kind.MOVE: self._migrator.move,
            Kind.REMOVE: self._remove,
        }

    def submit(self, agent: Agent, operation: Operation, urgent: bool) -> None:
        """Run an operation soon, and those that follow from it."""
        row = agent.row
        provider = self._registry.specs.provider(row) if operation.kind is Kind.MOVE else row.provider
        self._registry.backends.get(provider).pool.submit(
            lambda: self._run(agent, operation), overdue=lambda job: self._overdue(agent, job), urgent=urgent
        )

    def _run(self, agent: Agent, first: Operation) -> None:
        operation: Operation | None = first
        while operation is not None:
            try:
                operation.check()
                change = self._steps[operation.kind](agent, operation)
            except Cancelled as error:
                change = self._cancelled(agent, operation, error)
            except DispatcherError as error:
                change = self._failed(agent, operation, error)
            except Exception as error:
                change = self._failed(agent, operation, _internal_error(error))
            if operation.status is Status.ABANDONED:
                self._returned(agent)
                return
            if change is None:
                return
            ended, operation = operation, self._registry.finish(agent, operation, change)
            if ended.observe_again and operation is None:
                self.on_changed(agent)

    # --- the operations

    def _start(self, agent: Agent, operation: Operation) -> Change:
        registry, row = self._registry, agent.row
        policy = registry.specs.policy(row.app)
        backend = registry.backends.get(row.provider)
        provider = backend.provider
        deadline = Deadline(policy.start_timeout)
        progress = registry.progress(agent, operation)
        handle = agent.handle
        seen: Observation | None = None
        resumed = False
        if handle is not None and row.observed in ASLEEP:
            registry.step(agent, operation, "resuming")
            try:
                provider.resume(handle, deadline=deadline, progress=progress)
                resumed = True
            except NotFound:
                handle = None
        elif handle is not None and row.observed not in DEAD:
            seen = provider.observe(handle, deadline=deadline.bounded(OBSERVE))
            if seen.state is not BackendState.RUNNING or not self._is_left_running(agent):
                seen = None
        if not resumed and seen is None:
            handle = self._ensure(agent, operation, backend)
            deadline = Deadline(policy.start_timeout)
        if handle is None:
            raise RuntimeError("an agent that runs has a handle")
        registry.on_step(row.name, operation.kind, WAITING)

        def report(seen: Observation) -> None:
            # While the agent is still starting (a virtual machine boots), the provider's stage is shown.
            booting = seen.state is BackendState.STARTING
            progress(operation.stage if booting else WAITING, seen.detail)

        probe = Probe(policy.health, self._proxy_gid)
        seen = await_ready(
            provider, handle, probe, operation=operation, deadline=deadline, seen=seen, report=report
        )
        agent.stdin = None
        fields = {
            **transitions.observed(row, seen, registry.clock.now()),
            **CLEARED,
            "observed": BackendState.RUNNING,
            "ready": True,
            "handle": handle.to_json(),
        }
        return Change(fields, [(EventKind.RESUMED if resumed else EventKind.READY, "")])

    def _is_left_running(self, agent: Agent) -> bool:
        """Whether a running agent is only waited for, as it could not be started again as it is."""
        row, specs = agent.row, self._registry.specs
        return specs.outdated(row) or (agent.stdin is None and specs.app(row.app).credentials == "stdin")

    def _ensure(self, agent: Agent, operation: Operation, backend: Backend) -> Handle:
        """Start an agent that is not asleep: prepare it, write its handle, ensure that it runs."""
        registry, row, provider = self._registry, agent.row, backend.provider
        policy = registry.specs.policy(row.app)
        stdin = agent.stdin if registry.specs.app(row.app).credentials == "stdin" else None
        spec = registry.specs.spec_to_start(row, stdin)
        if spec.app.credentials == "stdin" and agent.stdin is None:
            raise Conflict(
                "The app starts only at a sign-in",
                why="it takes the password on its standard input, and passwords are not stored",
                fix="sign out and sign in again",
            )
        progress = registry.progress(agent, operation)
        registry.step(agent, operation, "preparing")
        self._data.prepare(row.name, row.uid)
        backend.prepare(spec.app, seconds=policy.prepare_timeout, progress=progress)
        planned = provider.handle(spec).to_json()
        if planned != row.handle:
            registry.update(agent, operation, handle=planned)
        registry.step(agent, operation, "starting")
        deadline = Deadline(policy.start_timeout)
        try:
            handle = provider.ensure(spec, deadline=deadline, progress=progress)
        except SpecConflict:  # it runs with an earlier spec
            handle = provider.handle(spec)
            provider.stop(handle, grace=policy.stop_grace, deadline=self._stop_deadline(agent), progress=progress)
            handle = provider.ensure(spec, deadline=Deadline(policy.start_timeout), progress=progress)
        registry.on_step(row.name, operation.kind, "started")
        return handle

    def _suspend(self, agent: Agent, operation: Operation, depth: Depth) -> Change:
        registry, handle = self._registry, agent.handle
        if handle is None:
            raise RuntimeError("an agent that runs has a handle")
        in_memory = depth is Depth.RAM
        registry.step(agent, operation, "suspending" if in_memory else "hibernating")
        registry.backends.get(agent.row.provider).provider.suspend(
            handle,
            depth=depth,
            deadline=Deadline(SUSPEND_TIME if in_memory else HIBERNATE_TIME),
            progress=registry.progress(agent, operation),
        )
        state = BackendState.SUSPENDED if in_memory else BackendState.HIBERNATED
        return Change(
            {"observed": state, "observed_at": registry.clock.now(), "ready": False, **CLEARED},
            [(EventKind.SUSPENDED if in_memory else EventKind.HIBERNATED, agent.reason)],
        )

    def _stop(self, agent: Agent, operation: Operation) -> Change:
        self._stop_agent(agent, operation)
        now = self._registry.clock.now()
        fields = {**ENDED, **CLEARED, "observed": BackendState.STOPPED, "observed_at": now}
        if agent.row.pending is Pending.RESTART:
            fields["pending"] = Pending.NONE
        return Change(fields, [(EventKind.STOPPED, agent.reason)])

    def _reset(self, agent: Agent, operation: Operation) -> Change:
        registry = self._registry
        self._migrator.complete(agent, operation)
        row = agent.row
        self._stop_agent(agent, operation)
        registry.step(agent, operation, "deleting the data")
        self._destroy(agent, operation, data=True)
        self._data.reset(row.name, row.uid, operation.check)
        fields = {**ENDED, **CLEARED, "observed": BackendState.ABSENT, "pending": Pending.NONE, "attempts": ()}
        return Change(fields, [(EventKind.RESET, "its data was deleted")])

    def _remove(self, agent: Agent, operation: Operation) -> None:
        registry = self._registry
        self._migrator.complete(agent, operation)
        row = agent.row
        self._stop_agent(agent, operation)
        registry.step(agent, operation, "removing")
        keep = row.keep_data
        self._destroy(agent, operation, data=not keep)
        self._migrator.clean_up(agent)
        if not keep:
            self._copies.delete(row.name, row.provider, registry.progress(agent, operation))
        registry.step(agent, operation, "deleting the data")
        self._data.remove(row.name, keep_data=keep, tick=operation.check)
        registry.step(agent, operation, "forgetting")
        now = registry.clock.now()
        kept = KeptRow(
            agent=row.name, uid=row.uid, app=row.app, provider=row.provider, handle=row.handle, time=now
        )
        event = registry.event(row, EventKind.REMOVED, "its data was kept" if keep else "")
        with agent.lock:
            operation.check()
            registry.store.remove(row, kept=kept if keep else None, events=[event])
        registry.drop(agent)
        registry.observers.publish([event])

    def _destroy(self, agent: Agent, operation: Operation, *, data: bool) -> None:
        handle = agent.handle
        if handle is not None:
            self._registry.backends.get(agent.row.provider).provider.destroy(
                handle,
                data=data,
                deadline=Deadline(DESTROY_TIME),
                progress=self._registry.progress(agent, operation),
            )

    def _stop_agent(self, agent: Agent, operation: Operation) -> None:
        handle = agent.handle
        if handle is None:  # it was never started
            return
        registry, row = self._registry, agent.row
        registry.step(agent, operation, "stopping")
        registry.backends.get(row.provider).provider.stop(
            handle,
            grace=registry.specs.policy(row.app).stop_grace,
            deadline=self._stop_deadline(agent),
            progress=registry.progress(agent, operation),
        )
        agent.stdin = None if agent.row.desired is not Desired.RUNNING else agent.stdin
        registry.on_step(row.name, operation.kind, "stopped")

    def _stop_deadline(self, agent: Agent) -> Deadline:
        return Deadline(self._registry.specs.policy(agent.row.app).stop_grace + STOP_SLACK)

    # --- failures

    def _cancelled(self, agent: Agent, operation: Operation, error: Cancelled) -> Change:
        if operation.status is Status.ACTIVE:
            fault = ProviderError(f"{error.what}, without a cancellation by the manager", why=error.why)
            return self._failed(agent, operation, fault)
        seen = self._observe(agent)
        return Change(transitions.observed(agent.row, seen, self._registry.clock.now()) if seen else {})

    def _failed(self, agent: Agent, operation: Operation, error: DispatcherError) -> Change:
        if operation.status is Status.ABANDONED:
            return Change()
        registry, row = self._registry, agent.row
        _log.warning("%s: %s failed: %s", printable(row.name), operation.kind.value, error)
        backend = registry.backends.get(row.provider)
        if transitions.is_backend_away(error):
            self.on_unavailable(backend)
        seen = self._observe(agent)
        starting = operation.kind in {Kind.START, Kind.MOVE}
        log = last_lines(backend, agent.handle, LOG_LINES) if starting else ()
        if operation.kind is Kind.START and seen and seen.state not in DEAD and _is_hopeless(row, error):
            seen = self._stop_remains(agent, operation) or seen
        change = transitions.failed(
            row,
            operation.kind,
            error,
            seen=seen,
            now=registry.clock.now(),
            policy=registry.specs.policy(row.app),
            log=log,
        )
        if change.fields["retry_at"] is None:
            agent.stdin = None
        return change

    def _stop_remains(self, agent: Agent, operation: Operation) -> Observation | None:
        """Stop the remains of a failed start; return the observation afterwards, None if that failed."""
        registry, handle = self._registry, agent.handle
        if handle is None:
            return None
        try:
            registry.backends.get(agent.row.provider).provider.stop(
                handle,
                grace=min(2.0, registry.specs.policy(agent.row.app).stop_grace),
                deadline=self._stop_deadline(agent),
                progress=registry.progress(agent, operation),
            )
        except DispatcherError as error:
            _log.warning(
                "%s: the remains of a failed start cannot be stopped: %s", printable(agent.row.name), error
            )
            return None
        return Observation(state=BackendState.STOPPED)

    def _observe(self, agent: Agent) -> Observation | None:
        """Return an observation, None if the backend does not answer."""
        handle = agent.handle
        if handle is None:
            return None
        try:
            backend = self._registry.backends.get(agent.row.provider)
            return backend.provider.observe(handle, deadline=Deadline(OBSERVE))
        except DispatcherError:
            return None

    def _overdue(self, agent: Agent, job: Job) -> None:
        """A provider's call for the agent hangs: fail, and begin no operation until it returns."""

        def decide(_: AgentRow) -> Change | None:
            operation = agent.operation
            if operation is None:
                return None
            operation.abandon()
            agent.operation, agent.availability = None, Availability.STUCK
            agent.epoch += 1
            error = hung_call(*job.call.split(".", 1))
            failure = Failure(what=error.what, why=error.why, fix=error.fix, time=self._registry.clock.now())
            return Change({**NO_OPERATION, "failure": failure, "retry_at": None}, [(EventKind.FAILED, str(error))])

        self._registry.change(agent, decide)

    def _returned(self, agent: Agent) -> None:
        """A call that hung has returned: observe the agent and continue."""
        seen = self._observe(agent)

        def decide(row: AgentRow) -> Change:
            agent.availability = Availability.FREE
            fields = transitions.observed(row, seen, self._registry.clock.now()) if seen else {}
            return Change({**fields, **CLEARED})

        self._registry.change(agent, decide)


def _is_hopeless(row: AgentRow, error: DispatcherError) -> bool:
    """Whether the remains of a failed start are stopped.

    An agent that ran or was asleep before is given a second chance: its memory may be worth it.
    """
    if transitions.is_backend_away(error):
        return False
    return row.observed in DEAD or bool(row.attempts) or not isinstance(error, StartFailed)


def _internal_error(error: Exception) -> DispatcherError:
    """Translate an exception of the manager itself: mostly of the disk."""
    if isinstance(error, OSError):
        return ProviderError(
            "The agent's directories cannot be used",
            why=str(error),
            fix="check that the disk of manager.state_dir has space and is writable",
        )
    _log.exception("An operation failed")
    return ProviderError(
        "The manager failed", why=f"{type(error).__name__}: {error}", fix="read its log, and report it"
    )
