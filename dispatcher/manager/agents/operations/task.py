"""A running operation, for its steps: reports progress, writes fields, stops the agent."""

from __future__ import annotations

import math
from typing import Any

from dispatcher.common.contained import text
from dispatcher.common.log import clean
from dispatcher.common.plain import plain
from dispatcher.config.schema import AppDefaults
from dispatcher.manager.agents.agent import Agent, Operation
from dispatcher.manager.agents.lifecycle import Change, Write
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.storage.rows import AgentRow
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.model import Handle

PROGRESS_INTERVAL = 0.25  # seconds between notifications of progress within a stage
STOP_SLACK = 30.0  # seconds beyond the time of grace
WRITE_STEP = 2.0  # seconds after which the step of a long operation is written


class Task:
    """One run of an operation on an agent, in one thread."""

    def __init__(self, registry: Registry, agent: Agent, operation: Operation) -> None:
        self.registry = registry
        self.agent = agent
        self.operation = operation
        self._published: tuple[str, str, float | None] = ("", "", None)
        self._published_at = 0.0  # boot time

    @property
    def row(self) -> AgentRow:
        """The agent's row at this moment."""
        return self.agent.row

    @property
    def handle(self) -> Handle | None:
        """The agent on its backend; None before its first start."""
        return self.agent.handle

    @property
    def backend(self) -> Backend:
        """The backend that has the agent."""
        return self.registry.backend(self.row)

    @property
    def policy(self) -> AppDefaults:
        """Time-outs and limits of the agent's app."""
        return self.registry.specs.policy(self.row.app)

    def progress(self, step: str, detail: str = "", fraction: float | None = None) -> None:
        """Report the progress of the operation, as `dispatcher.plugin.provider.Progress`.

        :raises Cancelled: the operation is no longer wanted.
        """
        operation = self.operation
        operation.check()
        now = (clean(text(step, 128), 64), clean(text(detail, 600), 300), _fraction(fraction))
        if now == self._published:
            return
        new_stage = now[0] != operation.stage
        operation.stage, operation.detail, operation.fraction = now
        if new_stage or boottime() - self._published_at > PROGRESS_INTERVAL:
            self._published, self._published_at = now, boottime()
            with self.agent.lock:
                if self.agent.operation is not operation:
                    return
                if self.registry.clock.now() - operation.since > WRITE_STEP and self.row.step != operation.stage:
                    self.registry.apply(self.agent, Change({"step": operation.stage}, write=Write.LATER))
            self.registry.notify(self.agent)

    def step(self, step: str) -> None:
        """Go to the next step of the operation.

        :raises Cancelled: the operation is no longer wanted.
        """
        self.passed(step)
        self.progress(step)

    def passed(self, step: str) -> None:
        """Tell `Registry.on_step` that the operation has reached a point."""
        self.registry.on_step(self.row.name, self.operation.kind, step)

    def stop(self, handle: Handle, *, grace: float | None = None) -> None:
        """Stop an agent on its backend; by default with the app's own time of grace.

        :raises DispatcherError: as the provider's `stop`.
        """
        usual = self.policy.stop_grace
        self.backend.provider.stop(
            handle,
            grace=usual if grace is None else min(grace, usual),
            deadline=Deadline(usual + STOP_SLACK),
            progress=self.progress,
        )

    def update(self, **fields: Any) -> None:
        """Write fields in the middle of the operation, before it goes on.

        :raises Unavailable: they cannot be written.
        :raises Cancelled: the operation is no longer wanted.
        """
        with self.agent.lock:
            self.operation.check()
            self.registry.apply(self.agent, Change(fields, write=Write.REQUIRED))


def _fraction(value: object) -> float | None:
    found = plain(value)
    if not isinstance(found, (int, float)) or math.isnan(found):
        return None
    return float(min(1.0, max(0.0, found)))
