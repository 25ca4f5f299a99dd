"""Tier *leaks*: a probe outside the provider counts what remains on the backend and in this process."""

from __future__ import annotations

import os
import threading

from dispatcher.plugin.errors import DispatcherError
from dispatcher.testing.base import Contract
from dispatcher.testing.driver import Driver, Steps, cancel, expect
from dispatcher.testing.kit import Kit, eventually, processes_of


class LeakChecks(Contract):
    """What was made is gone when it should be."""

    def test_destroy_leaves_the_backend_clean(self, driver: Driver, kit: Kit) -> None:
        """After `destroy` the backend holds the same as before, by its own tools."""
        kit.share(driver, ["alice", "bob"])  # what all agents share may be made here
        before = self.leftovers(kit.installation)
        agent = kit.start(driver, kit.spec(driver.provider, "leak"))
        during = self.leftovers(kit.installation)
        expect(during - before, "leftovers() does not show a running agent: this probe of the class sees nothing")
        driver.destroy(agent.handle)
        expect(
            eventually(lambda: not self.leftovers(kit.installation) - before, 3, 0.1),
            f"destroy() left {sorted(self.leftovers(kit.installation) - before)} on the backend",
        )

    def test_no_process_is_left(self, driver: Driver, kit: Kit) -> None:
        """After `destroy` no process of this host runs as the agent's user."""
        agent = kit.start(driver, kit.spec(driver.provider, "leak-process"))
        agent.inside.post("/heartbeat", path=agent.within("beat"))
        driver.destroy(agent.handle)
        if kit.privileged:
            expect(
                eventually(lambda: not processes_of(agent.spec.uid), 3, 0.1),
                f"after destroy() its processes {processes_of(agent.spec.uid)} live on: end the whole cgroup",
            )

    def test_run_directory_is_left_clean(self, driver: Driver, kit: Kit) -> None:
        """After `destroy` the agent's run_dir is empty and the provider's own directories hold nothing of it."""
        spec = kit.spec(driver.provider, "leak-files", values={"token": "kit-leak-token"})
        agent = kit.start(driver, spec)
        driver.destroy(agent.handle)
        left = sorted(os.listdir(spec.run_dir))
        expect(not left, f"after destroy() run_dir still holds {left}: remove sockets and secrets")
        own = [
            str(path)
            for root in (kit.context.state_dir, kit.context.run_dir)
            for path in root.rglob("*")
            if agent.handle.name in str(path)
        ]
        expect(not own, f"after destroy() the provider still keeps {own}")

    def test_failed_starts_leave_nothing(self, driver: Driver, kit: Kit) -> None:
        """Repeated cancelled and failed starts leave no descriptor, no thread and nothing on the backend."""
        kit.share(driver, ["alice", "bob"])
        before = self.leftovers(kit.installation)
        good = kit.spec(driver.provider, "leak-failed")
        bad = kit.spec(driver.provider, "leak-failed", options=self.missing_options())
        handle = driver.handle(good)
        kit.fresh(handle)

        for _ in range(3):
            for spec, steps in ((good, Steps(1, cancel)), (bad, Steps())):
                try:
                    driver.ensure(spec, progress=steps)
                except DispatcherError:
                    pass
        left = self.leftovers(kit.installation) - before
        expect(not left, f"starts that failed left {sorted(left)} on the backend")

    def test_instances_release_everything(self, driver: Driver, kit: Kit) -> None:
        """Closed instances leave no descriptor and no thread in this process."""
        spec = kit.spec(driver.provider, "leak-instance")

        def cycle() -> None:
            other = Driver(self.another(driver.provider), patience=self.patience, slack=self.slack)
            other.check()
            other.list()
            other.observe(other.handle(spec))
            other.provider.close()

        cycle()
        cycle()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(5):
            cycle()
        expect(
            eventually(lambda: len(os.listdir("/proc/self/fd")) <= before[0] + 2, 3, 0.1),
            f"instances left {len(os.listdir('/proc/self/fd')) - before[0]} descriptors: close them in close()",
        )
        expect(
            eventually(lambda: threading.active_count() <= before[1] + 1, 3, 0.1),
            f"five instances left {threading.active_count() - before[1]} threads: end them in close()",
        )

    def test_cycles_leave_nothing_here(self, driver: Driver, kit: Kit) -> None:
        """Repeated starts and destroys leave no descriptor and no thread in this process."""
        spec = kit.spec(driver.provider, "leak-cycle")

        def cycle() -> None:
            kit.start(driver, spec)
            driver.destroy(driver.handle(spec))

        cycle()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(3):
            cycle()
        expect(
            eventually(lambda: len(os.listdir("/proc/self/fd")) <= before[0] + 2, 3, 0.1),
            f"three starts left {len(os.listdir('/proc/self/fd')) - before[0]} descriptors open",
        )
        expect(
            eventually(lambda: threading.active_count() <= before[1] + 2, 3, 0.1),
            f"three starts left {threading.active_count() - before[1]} threads",
        )
