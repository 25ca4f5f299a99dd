"""Doing: the operations on an agent, step by step, in a thread of its provider's pool.

Each step is written or idempotent, so that a manager that is killed anywhere and started again goes on: the
reconciler observes, `lifecycle` decides, and the same operation runs again from its beginning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.agents import transitions
from dispatcher.manager.agents.agent import Agent, Operation
from dispatcher.manager.agents.copies import Copies
from dispatcher.manager.agents.lifecycle import ASLEEP, DEAD, Desired, Kind, Pending
from dispatcher.manager.agents.migration import Mover
from dispatcher.manager.agents.readiness import OBSERVE, Probe, await_ready
from dispatcher.manager.agents.registry import Change, Engine
from dispatcher.manager.backends.backend import Backend, hanging
from dispatcher.manager.backends.pool import Job
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.agents import AgentRow, Failure, KeptRow
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

STOP_SLACK = 30.0  # seconds beyond the grace time
SUSPEND_TIME = 60.0
HIBERNATE_TIME = 600.0  # seconds; a guest's memory goes to disk
DESTROY_TIME = 300.0
WAITING = "waiting for the app"
LAST_WORDS = 0.4  # seconds that what an app said as it ended may still be on its way

_log = logging.getLogger("dispatcher.manager")


class Operations:
    """Runs operations.

    :ivar asked: called with a backend that could not be asked, so that somebody looks after it.
    :ivar nudged: called with an agent of which the backend reported a change that nobody looked at.
    """

    def __init__(
        self, engine: Engine, data: AgentData, mover: Mover, copies: Copies, accounts: HostAccounts
    ) -> None:
        self._engine = engine
        self._data = data
        self._proxy_gid = accounts.proxy_gid if accounts.agent_uids is not None else None
        self._mover = mover
        self._copies = copies
        self.asked: Callable[[Backend], None] = lambda _backend: None
        self.nudged: Callable[[Agent], None] = lambda _agent: None
        self._doing: dict[Kind, Callable[[Agent, Operation], Change | None]] = {
            Kind.START: self._start,
            Kind.SUSPEND: lambda agent, operation: self._suspend(agent, operation, Depth.RAM),
            Kind.HIBERNATE: lambda agent, operation: self._suspend(agent, operation, Depth.DISK),
            Kind.STOP: self._stop,
            Kind.RESET: self._reset,
            Kind.MOVE: self._mover.move,
            Kind.REMOVE: self._remove,
        }

    def submit(self, agent: Agent, operation: Operation, urgent: bool) -> None:
        """Run an operation soon, and those that follow from it."""
        row = agent.row
        provider = self._engine.specs.provider(row) if operation.kind is Kind.MOVE else row.provider
        self._engine.backends.get(provider).pool.submit(
            lambda: self._run(agent, operation), overdue=lambda job: self._overdue(agent, job), urgent=urgent
        )

    def _run(self, agent: Agent, first: Operation) -> None:
        operation: Operation | None = first
        while operation is not None:
            try:
                operation.check()
                change = self._doing[operation.kind](agent, operation)
            except Cancelled as error:
                change = self._cancelled(agent, operation, error)
            except DispatcherError as error:
                change = self._failed(agent, operation, error)
            except Exception as error:
                change = self._failed(agent, operation, _own_fault(error))
            if operation.abandoned:
                self._returned(agent)
                return
            if change is None:
                return
            ended, operation = operation, self._engine.finish(agent, operation, change)
            if ended.nudged and operation is None:  # the backend reported a change after the last look
                self.nudged(agent)

    # --- the operations

    def _start(self, agent: Agent, operation: Operation) -> Change:
        engine, row = self._engine, agent.row
        policy = engine.specs.policy(row.app)
        backend = engine.backends.get(row.provider)
        guard = backend.guard
        deadline = Deadline(policy.start_timeout)
        progress = engine.progress(agent, operation)
        handle = agent.handle
        seen: Observation | None = None
        resumed = False
        if handle is not None and row.observed in ASLEEP:
            engine.step(agent, operation, "resuming")
            try:
                guard.resume(handle, deadline=deadline, progress=progress)
                resumed = True
            except NotFound:
                handle = None
        elif handle is not None and row.observed not in DEAD:
            seen = guard.observe(handle, deadline=deadline.bounded(OBSERVE))
            if seen.state is not BackendState.RUNNING or not self._is_left_alone(agent):
                seen = None
        if not resumed and seen is None:
            handle = self._make(agent, operation, backend)
            deadline = Deadline(policy.start_timeout)
        if handle is None:
            raise RuntimeError("an agent that runs has a handle")
        engine.on_step(row.name, operation.kind, WAITING)

        def tell(seen: Observation) -> None:
            # What still starts, a machine that boots say, is shown in the provider's own words.
            booting = seen.state is BackendState.STARTING
            progress(operation.stage if booting else WAITING, seen.detail)

        probe = Probe(policy.health, self._proxy_gid)
        seen = await_ready(guard, handle, probe, operation=operation, deadline=deadline, seen=seen, tell=tell)
        agent.stdin = None
        fields = {
            **transitions.observed(row, seen, engine.clock.now()),
            "observed": BackendState.RUNNING,
            "ready": True,
            "handle": handle.to_json(),
            "failure": None,
            "retry_at": None,
        }
        return Change(fields, [("resumed" if resumed else "ready", "")])

    def _is_left_alone(self, agent: Agent) -> bool:
        """Whether an agent that runs is only waited for, as it could not be made again as it is."""
        row = agent.row
        return self._engine.specs.outdated(row) or (
            agent.stdin is None and self._engine.specs.app(row.app).credentials == "stdin"
        )

    def _make(self, agent: Agent, operation: Operation, backend: Backend) -> Handle:
        """Bring an agent that does not sleep to run: prepared, its handle written, ensured."""
        engine, row, guard = self._engine, agent.row, backend.guard
        policy = engine.specs.policy(row.app)
        stdin = agent.stdin if engine.specs.app(row.app).credentials == "stdin" else None
        spec = engine.specs.spec_to_start(row, stdin)
        if spec.app.credentials == "stdin" and agent.stdin is None:
            raise Conflict(
                "The app needs your sign-in to start",
                why="it takes the password on its standard input, and nobody keeps passwords",
                fix="sign out and sign in again",
            )
        progress = engine.progress(agent, operation)
        engine.step(agent, operation, "preparing")
        self._data.prepare(row)
        backend.prepare(spec.app, seconds=policy.prepare_timeout, progress=progress)
        planned = guard.handle(spec).to_json()
        if planned != row.handle:
            engine.update(agent, operation, handle=planned)
        engine.step(agent, operation, "starting")
        deadline = Deadline(policy.start_timeout)
        try:
            handle = guard.ensure(spec, deadline=deadline, progress=progress)
        except SpecConflict:  # it runs as it was meant to be earlier; what is wanted is how it is meant now
            handle = guard.handle(spec)
            guard.stop(handle, grace=policy.stop_grace, deadline=self._stop_deadline(agent), progress=progress)
            handle = guard.ensure(spec, deadline=Deadline(policy.start_timeout), progress=progress)
        engine.on_step(row.name, operation.kind, "started")
        return handle

    def _suspend(self, agent: Agent, operation: Operation, depth: Depth) -> Change:
        engine, handle = self._engine, agent.handle
        if handle is None:
            raise RuntimeError("an agent that runs has a handle")
        engine.step(agent, operation, "suspending" if depth is Depth.RAM else "hibernating")
        seconds = SUSPEND_TIME if depth is Depth.RAM else HIBERNATE_TIME
        engine.backends.get(agent.row.provider).guard.suspend(
            handle, depth=depth, deadline=Deadline(seconds), progress=engine.progress(agent, operation)
        )
        state = BackendState.SUSPENDED if depth is Depth.RAM else BackendState.HIBERNATED
        return Change(
            {"observed": state, "observed_at": engine.clock.now(), "ready": False, **_QUIET},
            [(state.value, agent.reason)],
        )

    def _stop(self, agent: Agent, operation: Operation) -> Change:
        self._stop_agent(agent, operation)
        fields = {**_ENDED, **_QUIET, "observed": BackendState.STOPPED, "observed_at": self._engine.clock.now()}
        if agent.row.pending is Pending.RESTART:
            fields["pending"] = Pending.NONE
        return Change(fields, [("stopped", agent.reason)])

    def _reset(self, agent: Agent, operation: Operation) -> Change:
        engine = self._engine
        self._mover.settle(agent, operation)
        row = agent.row
        self._stop_agent(agent, operation)
        engine.step(agent, operation, "deleting the data")
        handle = agent.handle
        if handle is not None:
            engine.backends.get(row.provider).guard.destroy(
                handle, data=True, deadline=Deadline(DESTROY_TIME), progress=engine.progress(agent, operation)
            )
        self._data.reset(row, operation.check)
        fields = {**_ENDED, **_QUIET, "observed": BackendState.ABSENT, "pending": Pending.NONE, "attempts": ()}
        return Change(fields, [("reset", "its data was deleted")])

    def _remove(self, agent: Agent, operation: Operation) -> None:
        engine = self._engine
        self._mover.settle(agent, operation)
        row = agent.row
        self._stop_agent(agent, operation)
        progress = engine.progress(agent, operation)
        engine.step(agent, operation, "removing")
        keep = row.keep_data
        handle = agent.handle
        if handle is not None:
            engine.backends.get(row.provider).guard.destroy(
                handle, data=not keep, deadline=Deadline(DESTROY_TIME), progress=progress
            )
        self._mover.abandon(agent)
        if not keep:
            self._copies.delete(row.name, row.provider, progress)
        engine.step(agent, operation, "deleting the data")
        self._data.remove(row.name, keep_data=keep, tick=operation.check)
        engine.step(agent, operation, "forgetting")
        now = engine.clock.now()
        kept = KeptRow(
            agent=row.name, uid=row.uid, app=row.app, provider=row.provider, handle=row.handle, time=now
        )
        event = engine.event(row, "removed", "its data was kept" if keep else "")
        with agent.lock:
            operation.check()
            engine.store.remove(row, kept=kept if keep else None, events=[event])
        engine.forget(agent)
        engine.history.tell([event])

    def _stop_agent(self, agent: Agent, operation: Operation) -> None:
        handle = agent.handle
        if handle is None:  # it was never started: there is nothing to stop, and nobody to ask
            return
        engine, row = self._engine, agent.row
        engine.step(agent, operation, "stopping")
        engine.backends.get(row.provider).guard.stop(
            handle,
            grace=engine.specs.policy(row.app).stop_grace,
            deadline=self._stop_deadline(agent),
            progress=engine.progress(agent, operation),
        )
        agent.stdin = None if agent.row.desired is not Desired.RUNNING else agent.stdin
        engine.on_step(row.name, operation.kind, "stopped")

    def _stop_deadline(self, agent: Agent) -> Deadline:
        return Deadline(self._engine.specs.policy(agent.row.app).stop_grace + STOP_SLACK)

    # --- what went wrong

    def _cancelled(self, agent: Agent, operation: Operation, error: Cancelled) -> Change:
        if not operation.cancel.is_set() and not operation.abandoned:
            fault = ProviderError(f"{error.what}, though nobody cancelled it", why=error.why)
            return self._failed(agent, operation, fault)
        seen = self._look(agent)
        return Change(transitions.observed(agent.row, seen, self._engine.clock.now()) if seen else {})

    def _failed(self, agent: Agent, operation: Operation, error: DispatcherError) -> Change:
        if operation.abandoned:
            return Change()
        engine, row = self._engine, agent.row
        _log.warning("%s: %s failed: %s", printable(row.name), operation.kind.value, error)
        policy = engine.specs.policy(row.app)
        if transitions.is_backend_away(error):
            self.asked(engine.backends.get(row.provider))
        seen = self._look(agent)
        log = self.last_lines(agent) if operation.kind in {Kind.START, Kind.MOVE} else ()
        if operation.kind is Kind.START and seen and seen.state not in DEAD and self._is_hopeless(row, error):
            seen = self._clean_up(agent, operation) or seen
        change = transitions.failed(
            row, operation.kind, error, seen=seen, now=engine.clock.now(), policy=policy, log=log
        )
        if change.fields["retry_at"] is None:
            agent.stdin = None
        return change

    @staticmethod
    def _is_hopeless(row: AgentRow, error: DispatcherError) -> bool:
        """Whether what a failed start left running is ended.

        Something that ran or slept before is given a second chance: its memory may be worth it.
        """
        if transitions.is_backend_away(error):
            return False
        return row.observed in DEAD or bool(row.attempts) or not isinstance(error, StartFailed)

    def _clean_up(self, agent: Agent, operation: Operation) -> Observation | None:
        engine, handle = self._engine, agent.handle
        if handle is None:
            return None
        try:
            engine.backends.get(agent.row.provider).guard.stop(
                handle,
                grace=min(2.0, engine.specs.policy(agent.row.app).stop_grace),
                deadline=self._stop_deadline(agent),
                progress=engine.progress(agent, operation),
            )
        except DispatcherError as error:
            _log.warning("%s: what a failed start left cannot be stopped: %s", printable(agent.row.name), error)
            return None
        return Observation(state=BackendState.STOPPED)

    def _look(self, agent: Agent) -> Observation | None:
        """Return how the agent is, None when nobody can say."""
        handle = agent.handle
        if handle is None:
            return None
        try:
            return self._engine.backends.get(agent.row.provider).guard.observe(handle, deadline=Deadline(OBSERVE))
        except DispatcherError:
            return None

    def last_lines(self, agent: Agent) -> list[str]:
        """Return the agent's last lines of output, as far as they can be had.

        What an app said as it ended may still be on its way to the log: none at all is asked for again.
        """
        patience = Deadline(LAST_WORDS)
        while not (lines := self._lines_now(agent)) and not patience.expired:
            time.sleep(0.05)
        return lines

    def _lines_now(self, agent: Agent) -> list[str]:
        handle = agent.handle
        backend = self._engine.backends.get(agent.row.provider)
        if handle is None or Capability.LOGS not in backend.capabilities:
            return []
        lines = []
        try:
            for line in backend.guard.logs(handle, tail=transitions.LOG_LINES, follow=False, deadline=Deadline(3)):
                lines.append(line.decode("utf-8", "replace")[:2000])
                if len(lines) >= transitions.LOG_LINES:
                    break
        except DispatcherError as error:
            _log.debug("%s: no log: %s", printable(agent.row.name), error)
        return lines

    def _overdue(self, agent: Agent, job: Job) -> None:
        """A provider's call for the agent hangs: say so, and do nothing with the agent until it returns."""

        def give_up(_: AgentRow) -> Change | None:
            operation = agent.operation
            if operation is None:
                return None
            operation.abandoned = True
            agent.operation, agent.stuck = None, True
            agent.epoch += 1
            error = hanging(*job.call.split(".", 1))
            failure = Failure(what=error.what, why=error.why, fix=error.fix, time=self._engine.clock.now())
            ended = {"operation": None, "step": "", "operation_since": None}
            return Change({**ended, "failure": failure, "retry_at": None}, [("failed", str(error))])

        self._engine.change(agent, give_up)

    def _returned(self, agent: Agent) -> None:
        """A call that hung has returned: see how the agent is and go on with what is desired."""
        seen = self._look(agent)

        def go_on(row: AgentRow) -> Change:
            agent.stuck = False
            now = self._engine.clock.now()
            fields = transitions.observed(row, seen, now) if seen else {}
            return Change({**fields, "failure": None, "retry_at": None})

        self._engine.change(agent, go_on)


_ENDED = {
    "ready": False,
    "endpoint": "",
    "owner_uid": None,
    "started_at": None,
    "spec_hash": "",
    "exit_reason": "",
}
_QUIET = {"failure": None, "retry_at": None}


def _own_fault(error: Exception) -> DispatcherError:
    """Translate what the core itself ran into: mostly the disk."""
    if isinstance(error, OSError):
        return ProviderError(
            "The agent's directories cannot be used",
            why=str(error),
            fix="see that the disk of manager.state_dir has space and is writable",
        )
    _log.exception("An operation failed")
    return ProviderError(
        "The manager failed", why=f"{type(error).__name__}: {error}", fix="see its log, and report it"
    )
