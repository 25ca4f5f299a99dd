"""Tier *adoption*: a fresh instance, after a restart of the manager, finds and runs everything."""

from __future__ import annotations

import pytest

from dispatcher.plugin.errors import SpecConflict
from dispatcher.plugin.model import BackendState, Capability, Handle
from dispatcher.testing.base import Contract
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.kit import Agent, Kit


class AdoptionChecks(Contract):
    """Nothing that matters is kept in an instance."""

    def fresh_driver(self, driver: Driver) -> Driver:
        """Return a fresh instance, as a restarted manager makes one."""
        return Driver(self.another(driver.provider), patience=self.patience, slack=self.slack)

    def test_close_leaves_agents_running(self, driver: Driver, alice: Agent) -> None:
        """`close` releases the instance's resources, a second `close` succeeds; agents keep running."""
        start = alice.inside.id()["start"]
        other = self.fresh_driver(driver)
        other.ensure(alice.spec)
        other.provider.close()
        other.provider.close()
        expect(
            alice.inside.answers() and alice.inside.id()["start"] == start, "close() ended or restarted an agent"
        )

    def test_fresh_instance_finds_all(self, driver: Driver, kit: Kit, alice: Agent, bob: Agent) -> None:
        """A fresh instance lists the same agents with the same handles and observations."""
        other = self.fresh_driver(driver)
        here, there = driver.list(), other.list()
        missing = {alice.spec.agent, bob.spec.agent} - set(there)
        expect(not missing, f"a fresh instance does not list {sorted(missing)}: ask the backend")
        expect(
            set(here) == set(there),
            f"a fresh instance lists {sorted(there)}, the old one {sorted(here)}: ask the backend",
        )
        for agent, (handle, seen) in here.items():
            expect(there[agent][0] == handle, f"a fresh instance gives {agent} another handle")
            expect(
                there[agent][1].state is seen.state,
                f"a fresh instance sees {agent} as {there[agent][1].state.value}",
            )
            expect(
                there[agent][1].spec_hash == seen.spec_hash,
                "a fresh instance does not know the spec_hash: store it on the backend",
            )
        other.provider.close()

    def test_fresh_instance_observes_by_stored_handle(self, driver: Driver, alice: Agent) -> None:
        """A handle from JSON and a fresh instance are enough to observe a running agent."""
        other = self.fresh_driver(driver)
        seen = other.observe(Handle.from_json(alice.handle.to_json()))
        expect(seen.state is BackendState.RUNNING, f"a fresh instance sees a running agent as {seen.state.value}")
        expect(seen.endpoint == alice.inside.endpoint, f"a fresh instance gives the endpoint {seen.endpoint}")
        other.provider.close()

    def test_fresh_instance_keeps_the_process(self, driver: Driver, alice: Agent) -> None:
        """`ensure` by a fresh instance adopts, it does not restart."""
        start = alice.inside.id()["start"]
        other = self.fresh_driver(driver)
        try:
            other.ensure(alice.spec)
        except SpecConflict:
            pytest.fail("a fresh instance does not recognise the spec of its own agent: store spec.hash with it")
        expect(alice.inside.id()["start"] == start, "a fresh instance restarted a running agent: adopt it")
        other.provider.close()

    def test_fresh_instance_ends_and_starts(self, driver: Driver, kit: Kit) -> None:
        """Stop, start and destroy work in a fresh instance, from a stored handle."""
        agent = kit.start(driver, kit.spec(driver.provider, "zoe"))
        stored = Handle.from_json(agent.handle.to_json())
        other = self.fresh_driver(driver)
        other.stop(stored)
        expect(not agent.inside.answers(), "a fresh instance's stop() did not end the agent")
        again = kit.start(other, agent.spec)
        expect(again.inside.answers(), "a fresh instance could not start the agent again")
        other.provider.close()
        last = self.fresh_driver(driver)
        last.destroy(stored)
        kit.gone(last, stored)
        last.provider.close()

    def test_fresh_instance_wakes(self, driver: Driver, kit: Kit) -> None:
        """SUSPEND: a fresh instance resumes an agent that was suspended before the restart."""
        agent = kit.shared(driver, "sleeper")
        other = self.fresh_driver(driver)
        if driver.can(Capability.SUSPEND):
            count = agent.inside.post("/count")
            driver.suspend(agent.handle)
            expect(
                other.state(agent.handle) is BackendState.SUSPENDED,
                f"a fresh instance sees a suspended agent as {other.state(agent.handle).value}",
            )
            other.resume(agent.handle)
            agent = kit.reach(other, agent.spec, agent.handle)
            expect(agent.inside.get("/count") == count, "a fresh instance woke the agent without its memory")
        expect(other.state(agent.handle) is BackendState.RUNNING, "the agent is not RUNNING in a fresh instance")
        other.provider.close()

    def test_unknown_agents_are_found(self, driver: Driver, kit: Kit) -> None:
        """An agent that is missing in the database is listed, and its listed handle is enough to destroy it."""
        agent = kit.start(driver, kit.spec(driver.provider, "forgotten"))
        other = self.fresh_driver(driver)
        found = other.list()
        expect("forgotten" in found, "a fresh instance does not list an agent that the store forgot")
        other.destroy(found["forgotten"][0])
        kit.gone(driver, agent.handle)
        other.provider.close()

    def test_installations_do_not_meet(self, driver: Driver, kit: Kit, alice: Agent) -> None:
        """Two installations on one backend: same agent name, two agents; neither lists or ends the other's."""
        start = alice.inside.id()["start"]
        context = kit.make_context("0123abcd")
        other = Driver(self.another(driver.provider, context), patience=self.patience, slack=self.slack)
        expect(
            alice.spec.agent not in other.list(),
            "list() yields another installation's agents: filter by the installation's label",
        )
        spec = kit.spec(other.provider, alice.spec.agent, installation=context.installation)
        handle = other.ensure(spec)
        try:
            expect(
                handle.name != alice.handle.name, "two installations got one backend name: use spec.backend_name"
            )
            theirs = kit.reach(other, spec, handle)
            expect(theirs.inside.id()["start"] != start, "another installation's ensure() took over our agent")
            expect(
                driver.list()[alice.spec.agent][0].name == alice.handle.name,
                "list() yields another installation's agent as ours: filter by the installation's label",
            )
        finally:
            other.destroy(handle)
            other.provider.close()
        expect(alice.inside.answers(), "another installation's destroy() ended our agent")
        left = self.leftovers(context.installation)
        expect(not left, f"another installation's destroy() left {sorted(left)} behind")
