"""Agents that nobody uses are put to rest.  Decides purely; asks providers for usage where an app says so.

Used is what a person does, or a stream that flows (feed.md); an open but silent tab is not.  All times are of
the steady clock: a jump of the wall clock puts nobody to sleep.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from dispatcher.config.load import AppDefaults
from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.commands import Intents
from dispatcher.manager.agents.lifecycle import ASLEEP, Desired
from dispatcher.manager.agents.registry import Engine
from dispatcher.manager.backends.backend import Backend
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import BackendState, Capability
from dispatcher.plugin.names import printable

BUSY_SHARE = 0.05  # of one core: more than that is work
SAMPLE = 5.0  # seconds, at least, between two samples of CPU use
FRESH = 60.0  # seconds for which work that was seen counts

_log = logging.getLogger("dispatcher.manager")


@dataclass(frozen=True, slots=True)
class Rest:
    """What shall become of an idle agent, and why."""

    desired: Desired
    reason: str


def rest(
    policy: AppDefaults,
    capabilities: frozenset[Capability],
    observed: BackendState,
    *,
    unused: float,
    asleep: float,
    working: bool,
) -> Rest | None:
    """Return what to do with an agent, None to leave it alone.

    :param unused: seconds since it was last used or started; :param asleep: seconds since it fell asleep.
    :param working: it uses the CPU, as far as that is known.
    """
    if observed in ASLEEP:
        if policy.idle_stop is not False and asleep >= policy.idle_stop:
            return Rest(Desired.STOPPED, f"it slept for {words(asleep)}")
        return None
    if observed is not BackendState.RUNNING or policy.idle_timeout is False or unused < policy.idle_timeout:
        return None
    if policy.busy_grace is not False and working and unused < policy.idle_timeout + policy.busy_grace:
        return None
    return Rest(idle_action(policy, capabilities), f"nobody used it for {words(unused)}")


def idle_action(policy: AppDefaults, capabilities: frozenset[Capability]) -> Desired:
    """Return how an app's agents rest, as near to what the configuration says as the provider can do."""
    can = {
        "suspend": (Capability.SUSPEND, Desired.SUSPENDED),
        "hibernate": (Capability.HIBERNATE, Desired.HIBERNATED),
    }
    order = {"suspend": ("suspend", "hibernate"), "hibernate": ("hibernate", "suspend"), "stop": ()}
    for action in order[policy.idle_action]:
        needed, desired = can[action]
        if needed in capabilities:
            return desired
    return Desired.STOPPED


def check_interval(policies: Iterable[AppDefaults]) -> float:
    """Return seconds between two checks: often enough for the shortest time-out."""
    limits = [
        value for policy in policies for value in (policy.idle_timeout, policy.idle_stop) if value is not False
    ]
    return min(5.0, max(0.2, min(limits, default=20.0) / 4))


class Idleness:
    """Looks after agents that nobody uses.

    What happened while no manager lived was not counted: everybody counts as used when this one began.
    """

    def __init__(self, engine: Engine, intents: Intents) -> None:
        self._engine = engine
        self._intents = intents
        self._began = engine.clock.now()

    def check(self) -> None:
        """Put to rest who is idle; called regularly."""
        engine = self._engine
        now = engine.clock.now()
        candidates: dict[str, list[Agent]] = {}
        for agent in list(engine.agents.values()):
            row = agent.row
            if row.operation is not None or row.failure is not None:
                continue
            awake = row.observed is BackendState.RUNNING and row.ready and row.desired is Desired.RUNNING
            asleep = row.observed in ASLEEP and row.desired in {Desired.SUSPENDED, Desired.HIBERNATED}
            backend = engine.backends.get(row.provider)
            if not (awake or asleep) or not backend.reachable:
                continue
            policy = engine.specs.policy(row.app)
            unused = now - max(agent.last_used or 0.0, row.since, self._began)
            found = rest(
                policy,
                backend.capabilities,
                row.observed,
                unused=unused,
                asleep=now - row.since,
                working=_may_work(agent, backend),
            )
            if found is not None:
                self._put_to_rest(agent, found)
            half_idle = policy.idle_timeout is not False and unused > policy.idle_timeout / 2
            if awake and half_idle and policy.busy_grace is not False and Capability.USAGE in backend.capabilities:
                candidates.setdefault(row.provider, []).append(agent)
        for provider, agents in candidates.items():
            self._sample(engine.backends.get(provider), agents)

    def _put_to_rest(self, agent: Agent, found: Rest) -> None:
        try:
            self._intents.idle(agent, found.desired, found.reason)
        except DispatcherError as error:
            _log.error("%s cannot be put to rest: %s", printable(agent.row.name), error)

    def _sample(self, backend: Backend, agents: list[Agent]) -> None:
        """See which of them work, in one call."""
        due = [agent for agent in agents if agent.cpu is None or boottime() - agent.cpu[0] >= SAMPLE]
        handles = {agent.row.name: (agent, handle) for agent in due if (handle := agent.handle) is not None}
        if not handles:
            return

        def run() -> None:
            try:
                found = backend.guard.usage([handle for _, handle in handles.values()], deadline=Deadline(10))
            except DispatcherError as error:
                _log.warning("The usage of agents is not known: %s", error)
                return
            now = boottime()
            for agent, handle in handles.values():
                usage = found.get(handle.name)
                if usage is not None and usage.cpu_seconds is not None:
                    note_cpu(agent, now, usage.cpu_seconds)

        backend.pool.submit(run, urgent=False)


def note_cpu(agent: Agent, now: float, seconds: float) -> float | None:
    """Remember a sample of CPU use; return the share of one core since the last one, None if there is none."""
    before, agent.cpu = agent.cpu, (now, seconds)
    if before is None or now <= before[0] or seconds < before[1]:
        return None
    share = (seconds - before[1]) / (now - before[0])
    agent.judged = now
    if share > BUSY_SHARE:
        agent.worked = now
    return share


def _may_work(agent: Agent, backend: Backend) -> bool:
    """Whether an agent was seen to work, or could be seen and was not looked at long enough."""
    now = boottime()
    return Capability.USAGE in backend.capabilities and (now - agent.judged >= FRESH or now - agent.worked < FRESH)


def words(seconds: float) -> str:
    """Return a length of time as people say it."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{max(0.0, seconds):.0f} s"
