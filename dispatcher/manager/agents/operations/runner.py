"""Start, stop, suspension, reset, removal: each step by step, in a thread of the provider's pool.

`task` is an operation in flight as the steps see it, and passes its progress on (docs/explanation/lifecycle.md).
Moves to another provider: `provider_move`.

Each step is written or idempotent, so that a manager that is killed at any point and started again continues: the
reconciler observes, `lifecycle` decides, and the same operation runs again from its beginning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dispatcher.common.contained import shown, text
from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.agents import restarts
from dispatcher.manager.agents.agent import Agent, Availability, Operation, Status
from dispatcher.manager.agents.lifecycle import (
    ASLEEP,
    CLEARED,
    DEAD,
    ENDED,
    NO_OPERATION,
    Change,
    EventKind,
    observed,
)
from dispatcher.manager.agents.operations.kept_data import Copies
from dispatcher.manager.agents.operations.provider_move import Mover
from dispatcher.manager.agents.operations.readiness import OBSERVE, Probe, await_ready
from dispatcher.manager.agents.operations.task import Task
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.backends.logs import last_lines
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.space import DISK_FIXES, disk_fix
from dispatcher.manager.storage.rows import AgentRow, Desired, Failure, KeptRow, Kind, Pending
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
from dispatcher.plugin.model import BackendState, Capability, Depth, Handle, Observation
from dispatcher.plugin.names import printable

SUSPEND_TIME = 60.0
HIBERNATE_TIME = 600.0  # seconds; a guest's memory goes to disk
DESTROY_TIME = 300.0
WAITING = "waiting for the app"

_log = logging.getLogger("dispatcher.manager")


class Runner:
    """Runs operations.

    :ivar on_unavailable: called with a backend that did not answer.
    :ivar on_changed: called with an agent of which the backend reported a change that was not observed yet.
    """

    def __init__(
        self, registry: Registry, data: AgentData, mover: Mover, copies: Copies, accounts: HostAccounts
    ) -> None:
        self._registry = registry
        self._data = data
        self._proxy_gid = accounts.proxy_gid if accounts.agent_uids is not None else None
        self._mover = mover
        self._copies = copies
        self.on_unavailable: Callable[[Backend], None] = lambda _backend: None
        self.on_changed: Callable[[Agent], None] = lambda _agent: None
        self._steps: dict[Kind, Callable[[Task], Change | None]] = {
            Kind.START: self._start,
            Kind.SUSPEND: lambda task: self._suspend(task, Depth.RAM),
            Kind.HIBERNATE: lambda task: self._suspend(task, Depth.DISK),
            Kind.STOP: self._stop,
            Kind.RESET: self._reset,
            Kind.MOVE: self._mover.move,
            Kind.REMOVE: self._remove,
        }

    def submit(self, agent: Agent, operation: Operation, urgent: bool) -> None:
        """Run an operation soon, and those that follow from it."""
        row = agent.row
        provider = self._registry.specs.provider(row) if operation.kind is Kind.MOVE else row.provider
        self._registry.backends.get(provider).pool.submit(
            lambda: self._run(agent, operation), overdue=lambda error: self._overdue(agent, error), urgent=urgent
        )

    def _run(self, agent: Agent, first: Operation) -> None:
        operation: Operation | None = first
        while operation is not None:
            task = Task(self._registry, agent, operation)
            try:
                change = self._carry_out(task)
            except BaseException as error:  # in what follows a failure: the operation ends all the same
                change = restarts.failed(
                    task.row,
                    operation.kind,
                    _internal_error(error),
                    seen=None,
                    now=self._registry.clock.now(),
                    policy=task.policy,
                    log=[],
                )
            if operation.status is Status.ABANDONED:
                self._returned(agent)
                return
            if change is None:
                return
            ended, operation = operation, self._registry.finish(agent, operation, change)
            if ended.observe_again and operation is None:
                self.on_changed(agent)

    def _carry_out(self, task: Task) -> Change | None:
        """Run the steps of an operation; return what they or their failure change."""
        try:
            task.operation.check()
            return self._steps[task.operation.kind](task)
        except Cancelled as error:
            return self._cancelled(task, error)
        except DispatcherError as error:
            return self._failed(task, error)
        except BaseException as error:  # code of a plugin may run where one of its values is used
            return self._failed(task, _internal_error(error))

    # --- the operations

    def _start(self, task: Task) -> Change:
        row, provider = task.row, task.backend.provider
        deadline = Deadline(task.policy.start_timeout)
        handle = task.handle
        seen: Observation | None = None
        resumed = False
        if handle is not None and row.observed in ASLEEP:
            task.step("resuming")
            try:
                provider.resume(handle, deadline=deadline, progress=task.progress)
                resumed = True
            except NotFound:
                handle = None
        elif handle is not None and row.observed not in DEAD:
            seen = provider.observe(handle, deadline=deadline.bounded(OBSERVE))
            if seen.state is not BackendState.RUNNING or not self._is_left_running(task.agent):
                seen = None
        if not resumed and seen is None:
            handle = self._ensure(task)
            deadline = Deadline(task.policy.start_timeout)
        if handle is None:
            raise RuntimeError("an agent that runs has a handle")
        task.passed(WAITING)

        def report(seen: Observation) -> None:
            # While the agent is still starting (a virtual machine boots), the provider's stage is shown.
            booting = seen.state is BackendState.STARTING
            task.progress(task.operation.stage if booting else WAITING, seen.detail)

        probe = Probe(
            task.policy.health,
            self._proxy_gid,
            self._data.paths.endpoint_dir(row.name),
            self._data.ids(row.uid)[0],
        )
        seen = await_ready(
            provider, handle, probe, operation=task.operation, deadline=deadline, seen=seen, report=report
        )
        task.agent.stdin = None
        if not resumed:
            task.agent.oom_kills, task.agent.notice, task.agent.killed_because = seen.oom_kills, ("", 0.0), ""
        fields = {
            **observed(row, seen, self._registry.clock.now()),
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

    def _ensure(self, task: Task) -> Handle:
        """Start an agent that is not asleep: prepare it, write its handle, ensure that it runs."""
        row, provider, policy, progress = task.row, task.backend.provider, task.policy, task.progress
        spec = self._registry.specs.spec_to_start(row, task.agent.stdin)
        if spec.app.credentials == "stdin" and task.agent.stdin is None:
            raise Conflict(
                "The app starts only at a sign-in",
                why="it takes the password on its standard input, and passwords are not stored",
                fix="sign out and sign in again",
            )
        task.step("preparing")
        if task.agent.last_used is not None and Capability.OWN_DATA not in task.backend.capabilities:
            self._data.check_present(row.name)
        self._data.prepare(row.name, row.uid)
        if Capability.OWN_DATA not in task.backend.capabilities:
            task.step("setting the limit of data")
            own = Capability.DISK_LIMIT in task.backend.capabilities
            self._data.limit(row.name, row.uid, None if own else spec.app.limits.disk, task.operation.check)
        task.backend.prepare(spec.app, seconds=policy.prepare_timeout, progress=progress)
        handle = provider.handle(spec)
        if handle.to_json() != row.handle:
            task.update(handle=handle.to_json())
        task.step("starting")
        try:
            handle = provider.ensure(spec, deadline=Deadline(policy.start_timeout), progress=progress)
        except SpecConflict:  # it runs with an earlier spec
            task.stop(handle)
            handle = provider.ensure(spec, deadline=Deadline(policy.start_timeout), progress=progress)
        task.passed("started")
        return handle

    def _suspend(self, task: Task, depth: Depth) -> Change:
        if task.handle is None:
            raise RuntimeError("an agent that runs has a handle")
        in_memory = depth is Depth.RAM
        task.step("suspending" if in_memory else "hibernating")
        # A request that the edge passed on to a suspended agent would hang until another one wakes the agent.
        self._registry.wait_for_edge()
        deadline = Deadline(SUSPEND_TIME if in_memory else HIBERNATE_TIME)
        task.backend.provider.suspend(task.handle, depth=depth, deadline=deadline, progress=task.progress)
        state = BackendState.SUSPENDED if in_memory else BackendState.HIBERNATED
        return Change(
            {"observed": state, "observed_at": self._registry.clock.now(), "ready": False, **CLEARED},
            [(EventKind.SUSPENDED if in_memory else EventKind.HIBERNATED, task.agent.reason)],
        )

    def _stop(self, task: Task) -> Change:
        self._stop_agent(task)
        now = self._registry.clock.now()
        fields = {**ENDED, **CLEARED, "observed": BackendState.STOPPED, "observed_at": now}
        if task.row.pending is Pending.RESTART:
            fields["pending"] = Pending.NONE
        return Change(fields, [(EventKind.STOPPED, task.agent.reason)])

    def _reset(self, task: Task) -> Change:
        self._mover.complete(task)
        self._stop_agent(task)
        task.step("deleting the data")
        self._destroy(task, data=True)
        self._data.reset(task.row.name, task.row.uid, task.operation.check)
        fields = {**ENDED, **CLEARED, "observed": BackendState.ABSENT, "pending": Pending.NONE, "attempts": ()}
        return Change(fields, [(EventKind.RESET, "its data was deleted")])

    def _remove(self, task: Task) -> None:
        self._mover.complete(task)
        registry, agent, row = self._registry, task.agent, task.row
        keep = row.keep_data
        self._stop_agent(task)
        task.step("removing")
        self._destroy(task, data=not keep)
        self._mover.clean_up(agent)
        if not keep:
            self._copies.delete(row.name, row.provider, task.progress)
        task.step("deleting the data")
        self._data.remove(row.name, keep_data=keep, tick=task.operation.check)
        task.step("forgetting")
        kept = KeptRow(
            agent=row.name,
            uid=row.uid,
            app=row.app,
            provider=row.provider,
            handle=row.handle,
            time=registry.clock.now(),
        )
        event = registry.event(row, EventKind.REMOVED, "its data was kept" if keep else "")
        with agent.lock:
            task.operation.check()
            registry.store.remove(row, kept=kept if keep else None, events=[event])
        registry.drop(agent)
        registry.observers.publish([event])

    def _destroy(self, task: Task, *, data: bool) -> None:
        if task.handle is not None:
            task.backend.provider.destroy(
                task.handle, data=data, deadline=Deadline(DESTROY_TIME), progress=task.progress
            )

    def _stop_agent(self, task: Task) -> None:
        if task.handle is None:  # it was never started
            return
        task.step("stopping")
        task.stop(task.handle)
        if task.row.desired is not Desired.RUNNING:
            task.agent.stdin = None
        task.passed("stopped")

    # --- failures

    def _cancelled(self, task: Task, error: Cancelled) -> Change:
        if task.operation.status is Status.ACTIVE:
            fault = ProviderError(f"{error.what}, without a cancellation by the manager", why=error.why)
            return self._failed(task, fault)
        return Change(self._observed(task.agent))

    def _failed(self, task: Task, error: DispatcherError) -> Change:
        agent, operation, row = task.agent, task.operation, task.row
        if operation.status is Status.ABANDONED:
            return Change()
        _log.warning("%s: %s failed: %s", printable(row.name), operation.kind.value, error)
        if restarts.is_backend_away(error):
            self.on_unavailable(task.backend)
        disk = self._registry.measure(agent)
        if disk and disk.full and isinstance(error, StartFailed):
            error.why = f"{error.why}; its data is full: {disk}".removeprefix("; ")
        seen = self._observe(agent)
        log: list[str] = []
        if operation.kind in {Kind.START, Kind.MOVE}:
            log = last_lines(task.backend, task.handle, restarts.LOG_LINES)
        if operation.kind is Kind.START and seen and seen.state not in DEAD and _is_hopeless(row, error):
            seen = self._stop_remains(task) or seen
        change = restarts.failed(
            row,
            operation.kind,
            error,
            seen=seen,
            now=self._registry.clock.now(),
            policy=task.policy,
            log=log,
        )
        if change.fields["retry_at"] is None:
            agent.stdin = None
        return change

    def _stop_remains(self, task: Task) -> Observation | None:
        """Stop the remains of a failed start; return the observation afterwards, None if that failed."""
        if task.handle is None:
            return None
        try:
            task.stop(task.handle, grace=2.0)
        except DispatcherError as error:
            _log.warning(
                "%s: the remains of a failed start cannot be stopped: %s", printable(task.row.name), error
            )
            return None
        return Observation(state=BackendState.STOPPED)

    def _observe(self, agent: Agent) -> Observation | None:
        """Return an observation, None if the backend does not answer."""
        if agent.handle is None:
            return None
        try:
            return self._registry.backend(agent.row).provider.observe(agent.handle, deadline=Deadline(OBSERVE))
        except DispatcherError:
            return None

    def _observed(self, agent: Agent) -> dict[str, Any]:
        """Return the fields that an observation changes; none if the backend does not answer."""
        seen = self._observe(agent)
        return observed(agent.row, seen, self._registry.clock.now()) if seen else {}

    def _overdue(self, agent: Agent, error: DispatcherError) -> None:
        """A provider's call for the agent hangs: fail, and begin no operation until it returns."""

        def decide(_: AgentRow) -> Change | None:
            operation = agent.operation
            if operation is None:
                return None
            operation.abandon()
            agent.operation, agent.availability = None, Availability.STUCK
            agent.epoch += 1
            failure = Failure(what=error.what, why=error.why, fix=error.fix, time=self._registry.clock.now())
            return Change({**NO_OPERATION, "failure": failure, "retry_at": None}, [(EventKind.FAILED, str(error))])

        self._registry.change(agent, decide)

    def _returned(self, agent: Agent) -> None:
        """A call that hung has returned: observe the agent and continue."""
        fields = self._observed(agent)

        def decide(_: AgentRow) -> Change:
            agent.availability = Availability.FREE
            return Change({**fields, **CLEARED})

        self._registry.change(agent, decide)


def _is_hopeless(row: AgentRow, error: DispatcherError) -> bool:
    """Whether the remains of a failed start are stopped.

    An agent that ran or was asleep before is given a second chance: its memory may be worth it.
    """
    if restarts.is_backend_away(error):
        return False
    return row.observed in DEAD or bool(row.attempts) or not isinstance(error, StartFailed)


def _internal_error(error: BaseException) -> DispatcherError:
    """Translate an exception of the manager itself: mostly of the agent's directories."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FIXES):
        return ProviderError("The agent's directories cannot be used", why=str(error), fix=disk_fix(error))
    _log.error("An operation failed", exc_info=shown(error))
    return ProviderError(
        "The manager failed", why=f"{type(error).__name__}: {text(error)}", fix="read its log, and report it"
    )
