"""Tier *concurrency*: many at once, readers beside writers, one slow agent."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from dispatcher.plugin.errors import Cancelled, DeadlineExceeded, DispatcherError, NotFound
from dispatcher.plugin.model import BackendState, Capability
from dispatcher.testing.base import Contract
from dispatcher.testing.driver import Driver, Steps, cancel, expect
from dispatcher.testing.kit import Agent, Kit


class ConcurrencyChecks(Contract, page="docs/howto/write-a-provider.md"):
    """A method may be called from any thread, for different agents at the same time."""

    def test_many_at_once(self, driver: Driver, kit: Kit) -> None:
        """Agents started at the same time all run, each in its own process; ended together, all are gone."""
        specs = [kit.spec(f"many{number}") for number in range(self.many)]
        agents = kit.together([partial(kit.start, driver, spec) for spec in specs])
        starts = {agent.inside.id()["start"] for agent in agents}
        expect(len(starts) == len(agents), "agents that were started at the same time share a process")
        expect(
            len({str(agent.inside.endpoint) for agent in agents}) == len(agents),
            "agents that were started at the same time share an endpoint",
        )
        listed = driver.list()
        expect(
            all(spec.agent in listed for spec in specs),
            "list() leaves out agents that were started at the same time",
        )
        kit.together([partial(driver.destroy, agent.handle) for agent in agents])
        left = set(driver.list()) & {spec.agent for spec in specs}
        expect(not left, f"destroying many at the same time left {sorted(left)}")

    def test_readers_beside_writers(self, driver: Driver, kit: Kit, alice: Agent) -> None:
        """`observe`, `list`, `usage` and `logs` return correct results during starts and stops."""
        spec = kit.spec("busy")
        handle = driver.handle(spec)
        done = threading.Event()

        def read() -> None:
            while not done.wait(0.02):
                driver.observe(handle)
                driver.list()
                if driver.can(Capability.USAGE):
                    driver.usage([handle, alice.handle])
                if driver.can(Capability.LOGS):
                    driver.logs(handle, tail=3)
                expect(
                    driver.state(alice.handle) is BackendState.RUNNING,
                    "while another agent was started and stopped, a running one was observed as not running",
                )

        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read)
            try:
                for _ in range(2):
                    kit.start(driver, spec, ready=False)
                    driver.stop(handle)
                driver.destroy(handle)
            finally:
                done.set()
        try:
            reader.result()
        except DispatcherError as error:
            raise AssertionError(
                f"reading beside a start or stop raised {type(error).__name__} ({error}): "
                "an agent that goes away meanwhile is ABSENT, or left out"
            ) from error

    def test_slow_start_delays_no_other(self, driver: Driver, kit: Kit, alice: Agent) -> None:
        """While one start is slow, other agents are observed, listed and started."""
        hold, held = threading.Event(), threading.Event()

        def slow() -> None:
            held.set()
            hold.wait(self.patience)

        spec = kit.spec("slow")
        kit.fresh(driver.handle(spec))
        took: float | None = None
        with ThreadPoolExecutor(1) as pool:
            start = pool.submit(driver.ensure, spec, progress=Steps(1, slow), seconds=3 * self.patience)
            try:
                expect(held.wait(self.patience), "ensure() never called progress")
                began = time.monotonic()
                driver.observe(alice.handle)
                driver.list()
                kit.start(driver, kit.spec("quick"))
                took = time.monotonic() - began
            except DeadlineExceeded:
                pass
            finally:
                hold.set()
        expect(
            took is not None and took < self.patience * 0.9,
            "while one start was held up, others waited for it: hold no lock that all agents share",
        )
        start.result()

    def test_start_against_stop(self, driver: Driver, kit: Kit) -> None:
        """After a cancelled start, a stop and a start in quick succession, the state is that of the last call."""
        spec = kit.spec("turns")
        handle = driver.handle(spec)
        kit.fresh(handle)
        for turn in range(1, 4):
            try:
                driver.ensure(spec, progress=Steps(turn, cancel))
            except Cancelled:
                pass
            driver.stop(handle)
            expect(
                driver.state(handle) in {BackendState.STOPPED, BackendState.ABSENT},
                "after a cancelled start and stop() the agent runs: the newest intent wins",
            )
        agent = kit.start(driver, spec)
        expect(agent.inside.answers(), "after quick turns of start and stop the last start does not run")
        driver.stop(handle)
        if driver.can(Capability.SUSPEND):
            try:
                driver.resume(handle)
            except NotFound:
                return
            except DispatcherError as error:
                expect(
                    error.code in {"not-found", "conflict", "provider-error"},
                    f"resume() of a stopped agent raised {error.code}: raise NotFound",
                )
