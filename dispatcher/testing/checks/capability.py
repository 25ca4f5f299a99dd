"""Tier *capability*, first part: sleep, logs, usage, events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from dispatcher.plugin.errors import NotFound
from dispatcher.plugin.model import BackendState, Capability, Depth
from dispatcher.testing.base import Contract, needs
from dispatcher.testing.driver import Driver, expect, raises, unsupported
from dispatcher.testing.kit import Agent, Kit, eventually

ASLEEP = {Depth.RAM: BackendState.SUSPENDED, Depth.DISK: BackendState.HIBERNATED}


class CapabilityChecks(Contract, page="docs/howto/write-a-provider.md"):
    """What the provider says that it can do, it does."""

    @pytest.mark.parametrize(
        "capability",
        [
            Capability.SUSPEND,
            Capability.HIBERNATE,
            Capability.LOGS,
            Capability.USAGE,
            Capability.EVENTS,
            Capability.OWN_DATA,
        ],
    )
    def test_undeclared_is_unsupported(
        self, driver: Driver, kit: Kit, alice: Agent, capability: Capability
    ) -> None:
        """The methods of a capability that is not declared raise `Unsupported`."""
        calls: dict[Capability, Callable[[], object]] = {
            Capability.SUSPEND: lambda: driver.suspend(alice.handle, depth=Depth.RAM),
            Capability.HIBERNATE: lambda: driver.suspend(alice.handle, depth=Depth.DISK),
            Capability.LOGS: lambda: driver.logs(alice.handle),
            Capability.USAGE: lambda: driver.usage([alice.handle]),
            Capability.EVENTS: lambda: driver.watch(print),
            Capability.OWN_DATA: lambda: driver.export_data(alice.handle, kit.root),
        }
        if not driver.can(capability):
            unsupported(capability.value, calls[capability])

    @pytest.mark.parametrize("depth", list(Depth))
    @needs()
    def test_sleep_keeps_memory(self, driver: Driver, kit: Kit, depth: Depth) -> None:
        """SUSPEND, HIBERNATE: a suspended agent does not answer; resumed, it has the same process and memory."""
        agent = kit.shared(driver, "sleeper")
        count = agent.inside.post("/count")
        start = agent.inside.id()["start"]
        driver.suspend(agent.handle, depth=depth)
        expect(
            driver.state(agent.handle) is ASLEEP[depth],
            f"after suspend(depth={depth.value}) the agent is {driver.state(agent.handle).value}",
        )
        agent.inside.timeout, patient = 0.5, agent.inside.timeout
        expect(not agent.inside.answers(), f"after suspend(depth={depth.value}) the app still answers")
        agent.inside.timeout = patient
        driver.suspend(agent.handle, depth=depth)
        driver.resume(agent.handle)
        expect(driver.state(agent.handle) is BackendState.RUNNING, "after resume() the agent is not RUNNING")
        agent = kit.reach(driver, agent.spec, agent.handle)
        expect(agent.inside.id()["start"] == start, "resume() started a new process: the memory must be kept")
        expect(agent.inside.get("/count") == count, "resume() lost the app's memory")
        driver.resume(agent.handle)

    @pytest.mark.parametrize("depth", list(Depth))
    @needs()
    def test_sleeping_agent_is_found_and_woken(
        self, driver: Driver, other: Driver, kit: Kit, depth: Depth
    ) -> None:
        """SUSPEND, HIBERNATE: a fresh instance lists a suspended agent; `resume` and `ensure` resume it."""
        agent = kit.shared(driver, "sleeper")
        count = agent.inside.post("/count")
        for wake, target in ((other.resume, agent.handle), (other.ensure, agent.spec)):
            driver.suspend(agent.handle, depth=depth)
            _, seen = other.list()[agent.spec.agent]
            expect(seen.state is ASLEEP[depth], f"list() returns {seen.state.value} for a suspended agent")
            expect(seen.spec_hash == agent.spec.hash, "a suspended agent has lost its spec_hash")
            if depth is Depth.RAM:
                expect(seen.endpoint, "a suspended agent has no endpoint: it keeps the one it had")
            wake(target)
            agent = kit.reach(other, agent.spec, agent.handle)
            expect(agent.inside.get("/count") == count, "a sleeping agent was replaced by a new one: resume it")

    @pytest.mark.parametrize("depth", list(Depth))
    @needs()
    def test_sleeping_agent_can_be_ended(self, driver: Driver, kit: Kit, depth: Depth) -> None:
        """SUSPEND, HIBERNATE: `stop` and `destroy` work on a suspended agent."""
        agent = kit.start(driver, kit.spec(f"peggy-{depth.value}"))
        driver.suspend(agent.handle, depth=depth)
        driver.stop(agent.handle)
        expect(
            driver.state(agent.handle) in {BackendState.STOPPED, BackendState.ABSENT},
            f"stop() left an agent that slept {driver.state(agent.handle).value}: thaw and end it",
        )
        again = kit.start(driver, agent.spec)
        driver.suspend(again.handle, depth=depth)
        driver.destroy(again.handle)
        kit.gone(driver, again.handle)

    @needs(Capability.SUSPEND)
    def test_suspend_of_absent_is_not_found(self, driver: Driver, kit: Kit) -> None:
        """SUSPEND: `suspend` of an absent agent raises `NotFound`."""
        with raises(NotFound, "suspend() of an absent agent"):
            driver.suspend(driver.handle(kit.spec("never")))

    @needs(Capability.LOGS)
    def test_logs_tail(self, driver: Driver, alice: Agent) -> None:
        """LOGS: the last lines, oldest first, in the requested number."""
        for number in range(5):
            alice.inside.post("/log", f"kit line {number}".encode())
        wanted = [b"kit line 2", b"kit line 3", b"kit line 4"]
        expect(
            eventually(lambda: list(driver.logs(alice.handle, tail=3)) == wanted, self.patience, 0.1),
            f"logs(tail=3) gave {driver.logs(alice.handle, tail=3)!r} rather than the last three lines",
        )
        expect(list(driver.logs(alice.handle, tail=0)) == [], "logs(tail=0) gave lines")

    @needs(Capability.LOGS)
    def test_logs_follow(self, driver: Driver, alice: Agent) -> None:
        """LOGS: `follow` yields new lines as they come and ends at the deadline."""
        timer = threading.Timer(0.7, lambda: alice.inside.post("/log", b"kit comes later"))
        timer.start()
        began = time.monotonic()
        lines = driver.logs(alice.handle, tail=0, follow=True, seconds=2.5)
        took = time.monotonic() - began
        timer.join()
        expect(
            b"kit comes later" in lines, f"logs(follow=True) missed a line that came meanwhile; it gave {lines!r}"
        )
        expect(took > 2, "logs(follow=True) ended before its deadline though the agent runs")

    @needs(Capability.LOGS)
    def test_logs_are_bounded(self, driver: Driver, kit: Kit) -> None:
        """LOGS: much output, arbitrary bytes and long lines (cut at 64 KiB) work; the size of files is bounded."""
        agent = kit.start(driver, kit.spec("quentin"))
        agent.inside.post("/log", b"x" * 100, repeat=self.log_lines)
        agent.inside.post("/log", b"\xff\x00\x1b[31m odd \xc3")
        agent.inside.post("/log", b"y" * 200_000)
        agent.inside.post("/log", b"kit end")
        expect(
            eventually(lambda: driver.logs(agent.handle, tail=1)[-1:] == [b"kit end"], self.patience, 0.2),
            f"after much output logs(tail=1) gave {[line[:80] for line in driver.logs(agent.handle, tail=1)]!r}",
        )
        lines = driver.logs(agent.handle, tail=50)
        expect(all(len(line) <= 65_536 for line in lines), "logs() gave a line over 64 KiB: cut it")
        size = sum(path.stat().st_size for path in agent.spec.log_dir.rglob("*") if path.is_file())
        expect(size < 64 * 1024 * 1024, f"log_dir holds {size} bytes: rotate the log files")

    @needs(Capability.USAGE)
    def test_usage_reports_memory_and_cpu(self, driver: Driver, alice: Agent, bob: Agent, kit: Kit) -> None:
        """USAGE: memory and CPU time of many agents in one call, without absent ones."""
        absent = driver.handle(kit.spec("never"))
        before = driver.usage([alice.handle, bob.handle, absent])
        expect(absent.name not in before, "usage() reports an absent agent: leave it out")
        for agent in (alice, bob):
            usage = before.get(agent.handle.name)
            expect(usage, "usage() leaves out a running agent")
            assert usage
            expect(
                usage.memory is not None and 10_000 < usage.memory < 8 << 30,
                f"usage() reports {usage.memory!r} bytes of memory: give the agent's own, in bytes",
            )
        first = before[alice.handle.name].cpu_seconds
        expect(first is not None and first >= 0, f"usage() reports {first!r} seconds of processor time")

        def grown() -> bool:
            alice.inside.post("/burn", seconds=0.5)
            now = driver.usage([alice.handle])[alice.handle.name].cpu_seconds
            return (now or 0.0) - (first or 0.0) > 0.2

        expect(eventually(grown, 5), "after seconds of work usage() reports no more processor time than before")
        expect(driver.usage([]) == {}, "usage([]) must give an empty mapping")

    @needs(Capability.USAGE)
    def test_memory_usage_grows(self, driver: Driver, kit: Kit) -> None:
        """USAGE: memory that an app allocates is reported."""
        agent = kit.shared(driver, "sleeper")
        before = driver.usage([agent.handle])[agent.handle.name].memory or 0
        agent.inside.post("/memory", bytes=40 << 20)
        expect(
            eventually(
                lambda: (driver.usage([agent.handle])[agent.handle.name].memory or 0) - before > 20 << 20, 5, 0.2
            ),
            "an app took 40 MiB and usage() does not show it: count all its processes' memory",
        )

    @needs(Capability.EVENTS)
    def test_events_report_an_exit(self, driver: Driver, kit: Kit) -> None:
        """EVENTS: `watch` reports an agent that ended by itself, in time, and nothing after `close`."""
        reported: list[str] = []
        watch = driver.watch(reported.append)
        try:
            agent = kit.start(driver, kit.spec("sybil"))
            time.sleep(0.2)
            reported.clear()
            agent.inside.post("/exit", code=3)
            expect(
                eventually(lambda: agent.handle.name in reported, self.event_seconds + 0.2),
                f"watch() did not report an end within {self.event_seconds} s; it reported {reported!r}: "
                "call on_change with Handle.name",
            )
        finally:
            watch.close()
        watch.close()
        reported.clear()
        driver.destroy(agent.handle)
        time.sleep(0.3)
        expect(not reported, "watch() still reports after close()")
