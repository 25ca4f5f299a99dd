"""Tier *leaks*: a probe outside the provider counts what remains on the backend and in this process."""

from __future__ import annotations

import os
from collections.abc import Callable

from dispatcher.testing.base import Contract
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.kit import Kit, eventually, files_holding, processes_of, zombies_of
from dispatcher.testing.remains import expect_nothing_left


class LeakChecks(Contract, page="docs/howto/write-a-provider.md"):
    """What was made is gone when it should be."""

    @property
    def _soon(self) -> float:
        return min(3.0, self.patience)

    def test_destroy_leaves_nothing(self, driver: Driver, kit: Kit) -> None:
        """`destroy` removes a running agent: endpoint, processes, zombies, files, secrets."""
        kit.share(driver, ["alice", "bob"])  # what all agents share may be made here
        before = self.leftovers(kit.context)
        dead = zombies_of()
        with self.leaves_nothing(kit, "destroy()", self._soon):
            agent = kit.start(driver, kit.spec("leak", values={"token": "kit-leak-token"}))
            agent.inside.post("/heartbeat", path=agent.within("beat"))
            expect(
                self.leftovers(kit.context) - before,
                "leftovers() does not show a running agent: this probe of the class sees nothing",
            )
            driver.destroy(agent.handle)
        kit.gone(driver, agent.handle)
        expect(not agent.inside.answers(), "after destroy() the endpoint still answers")
        driver.destroy(agent.handle)
        if kit.privileged:
            expect(
                eventually(lambda: not processes_of(agent.spec.uid), self._soon, 0.1),
                f"after destroy() its processes {processes_of(agent.spec.uid)} live on: end the whole cgroup",
            )
        uid = agent.spec.uid if kit.privileged else None
        expect(
            eventually(lambda: not zombies_of(uid) - dead, self._soon, 0.1),
            f"after destroy() {sorted(zombies_of(uid) - dead)} are zombies: wait for every child",
        )
        left = sorted(os.listdir(agent.spec.run_dir))
        expect(not left, f"after destroy() run_dir still holds {left}: remove sockets and secrets")
        own = [
            str(path)
            for root in (kit.context.state_dir, kit.context.run_dir)
            for path in root.rglob("*")
            if agent.handle.name in str(path)
        ]
        expect(not own, f"after destroy() the provider still keeps {own}")
        shown = files_holding(b"kit-leak-token", kit.root)
        expect(not shown, f"after destroy() a secret still lies in {shown}")

    def test_instances_release_everything(self, driver: Driver, kit: Kit) -> None:
        """Closed instances leave no descriptor, thread or zombie in this process."""
        spec = kit.spec("leak-instance")

        def cycle() -> None:
            other = self.drive_another(driver.provider)
            other.check()
            other.list()
            other.observe(other.handle(spec))
            other.close()

        self._leaves_nothing_here("instances", cycle, 5)

    def test_cycles_leave_nothing_here(self, driver: Driver, kit: Kit) -> None:
        """Repeated starts and destroys leave no descriptor, thread or zombie in this process."""
        spec = kit.spec("leak-cycle")

        def cycle() -> None:
            kit.start(driver, spec)
            driver.destroy(driver.handle(spec))

        self._leaves_nothing_here("starts", cycle, 3)

    def _leaves_nothing_here(self, what: str, cycle: Callable[[], None], times: int) -> None:
        __tracebackhide__ = True
        expect_nothing_left(
            cycle, times, what, descriptors="close them", threads="end them in close()", seconds=self._soon
        )
