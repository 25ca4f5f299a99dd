"""Whether an agent uses the CPU, from samples of its CPU time.  Pure: times are passed in."""

from __future__ import annotations

BUSY_SHARE = 0.05  # of one core: more than that is work
MIN_INTERVAL = 5.0  # seconds between two samples
MEMORY = 60.0  # seconds for which observed work counts


class CpuActivity:
    """Samples of one agent, on the boot clock."""

    def __init__(self) -> None:
        self._sample: tuple[float, float] | None = None  # boot time and CPU seconds
        self._compared = float("-inf")  # when two samples were last compared
        self._worked = float("-inf")  # when the agent was last seen to work

    def due(self, now: float) -> bool:
        """Whether the last sample is old enough for another one."""
        return self._sample is None or now - self._sample[0] >= MIN_INTERVAL

    def sample(self, now: float, seconds: float) -> float | None:
        """Add a sample; return the share of one core since the last one, None if there was none."""
        before, self._sample = self._sample, (now, seconds)
        if before is None or now <= before[0] or seconds < before[1]:
            return None
        share = (seconds - before[1]) / (now - before[0])
        self._compared = now
        if share > BUSY_SHARE:
            self._worked = now
        return share

    def may_work(self, now: float) -> bool:
        """Whether the agent worked recently, or was not sampled recently enough to know."""
        return now - self._compared >= MEMORY or now - self._worked < MEMORY
