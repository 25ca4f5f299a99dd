"""Decides that an agent is idle, and what to do with it then.  Pure.

An agent is in use while a person acts or a stream flows (docs/reference/feed.md); an open but silent tab is not
use.
`idle_monitor` calls `idle_decision` for every agent, regularly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from dispatcher.common.humanize import duration
from dispatcher.config.schema import AppDefaults
from dispatcher.manager.agents.lifecycle import ASLEEP
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin.model import BackendState, Capability

BUSY_SHARE = 0.05  # of one core, on average: more than that is work
MIN_INTERVAL = 5.0  # seconds between two samples
MEMORY = 60.0  # seconds over which the average is taken


@dataclass(frozen=True, slots=True)
class IdleDecision:
    """The new desired state of an idle agent, and why."""

    desired: Desired
    reason: str


def idle_decision(
    policy: AppDefaults,
    capabilities: frozenset[Capability],
    observed: BackendState,
    *,
    unused: float,
    asleep: float,
    working: bool,
) -> IdleDecision | None:
    """Return what to do with an agent, None to leave it as it is.

    :param unused: seconds since it was last used or started; :param asleep: seconds since it was suspended.
    :param working: it uses the CPU, as far as that is known.
    """
    if observed in ASLEEP:
        if policy.idle_stop is not False and asleep >= policy.idle_stop:
            return IdleDecision(Desired.STOPPED, f"it was asleep for {duration(asleep)}")
        return None
    if observed is not BackendState.RUNNING or policy.idle_timeout is False or unused < policy.idle_timeout:
        return None
    if policy.busy_grace is not False and working and unused < policy.idle_timeout + policy.busy_grace:
        return None
    return IdleDecision(idle_action(policy, capabilities), f"it was not used for {duration(unused)}")


def idle_action(policy: AppDefaults, capabilities: frozenset[Capability]) -> Desired:
    """Return the desired state of idle agents: the configured one, or the nearest that the provider has."""
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
    """Return the seconds between two checks: a quarter of the shortest timeout, within bounds."""
    limits = [
        value for policy in policies for value in (policy.idle_timeout, policy.idle_stop) if value is not False
    ]
    return min(5.0, max(0.2, min(limits, default=20.0) / 4))


class CpuActivity:
    """Whether an agent uses the CPU, from samples of its CPU time on the boot clock.

    Its average counts: an app's housekeeping, once a minute or in small steps, is no work.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()  # boot time and CPU seconds, of the last minute

    def due(self, now: float) -> bool:
        """Whether the last sample is old enough for another one."""
        return not self._samples or now - self._samples[-1][0] >= MIN_INTERVAL

    def sample(self, now: float, seconds: float) -> float | None:
        """Add a sample; return the share of one core since the last one, None if there was none."""
        samples = self._samples
        if samples and (now <= samples[-1][0] or seconds < samples[-1][1]):  # the app was started again
            samples.clear()
        samples.append((now, seconds))
        while len(samples) > 2 and samples[1][0] <= now - MEMORY:
            samples.popleft()
        return _share(samples[-2], samples[-1]) if len(samples) > 1 else None

    def may_work(self, now: float) -> bool:
        """Whether the agent has worked within the last minute, or was not sampled recently enough to know."""
        samples = self._samples
        if len(samples) < 2 or now - samples[-1][0] >= MEMORY:
            return True
        return _share(samples[0], samples[-1]) > BUSY_SHARE


def _share(first: tuple[float, float], last: tuple[float, float]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])
