"""Puts idle agents to sleep: checks all agents regularly by the rules of `idle`.

It writes the desired state; `operations.runner` carries it out.  Where `busy_grace` is set it samples CPU usage.
Times are of the steady clock: a jump of the wall clock makes no agent idle.
"""

from __future__ import annotations

import logging

from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.idle import IdleDecision, idle_decision
from dispatcher.manager.agents.lifecycle import ASLEEP, Change, Write
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.storage.rows import AgentRow, Desired
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import BackendState, Capability
from dispatcher.plugin.names import printable

_log = logging.getLogger("dispatcher.manager")


class IdleMonitor:
    """Suspends, hibernates or stops idle agents.

    Use while no manager ran was not counted: every agent counts as used when this manager began.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._began = registry.clock.now()

    def check(self) -> None:
        """Check every agent once."""
        registry = self._registry
        now = registry.clock.now()
        to_sample: dict[str, list[Agent]] = {}
        for agent in list(registry.agents.values()):
            row = agent.row
            if row.operation is not None or row.failure is not None:
                continue
            awake = row.observed is BackendState.RUNNING and row.ready and row.desired is Desired.RUNNING
            asleep = row.observed in ASLEEP and row.desired in {Desired.SUSPENDED, Desired.HIBERNATED}
            backend = registry.backends.get(row.provider)
            if not (awake or asleep) or not backend.reachable:
                continue
            policy = registry.specs.policy(row.app)
            has_usage = Capability.USAGE in backend.capabilities
            unused = now - max(agent.last_used or 0.0, row.since, self._began)
            decision = idle_decision(
                policy,
                backend.capabilities,
                row.observed,
                unused=unused,
                asleep=now - row.since,
                working=has_usage and agent.cpu.may_work(boottime()),
            )
            if decision is not None:
                self._apply(agent, decision)
            half_idle = policy.idle_timeout is not False and unused > policy.idle_timeout / 2
            if awake and half_idle and has_usage and policy.busy_grace is not False:
                to_sample.setdefault(row.provider, []).append(agent)
        for provider, agents in to_sample.items():
            self._sample(registry.backends.get(provider), agents)

    def _apply(self, agent: Agent, decision: IdleDecision) -> None:
        before = agent.row

        def decide(row: AgentRow) -> Change | None:
            if row is not before or row.operation is not None:
                return None  # it changed meanwhile
            agent.reason = decision.reason
            return Change({"desired": decision.desired}, write=Write.REQUIRED)

        try:
            self._registry.change(agent, decide)
        except DispatcherError as error:
            _log.error("%s is idle and cannot be %s: %s", printable(agent.row.name), decision.desired.value, error)

    def _sample(self, backend: Backend, agents: list[Agent]) -> None:
        """Sample the CPU time of some agents in one call."""
        due = [agent for agent in agents if agent.cpu.due(boottime())]
        handles = {agent.row.name: (agent, handle) for agent in due if (handle := agent.handle) is not None}
        if not handles:
            return

        def run() -> None:
            try:
                found = backend.provider.usage([handle for _, handle in handles.values()], deadline=Deadline(10))
            except DispatcherError as error:
                _log.warning("The usage of agents is unknown: %s", error)
                return
            now = boottime()
            for agent, handle in handles.values():
                usage = found.get(handle.name)
                if usage is not None and usage.cpu_seconds is not None:
                    agent.cpu.sample(now, usage.cpu_seconds)

        backend.pool.submit(run, urgent=False)
