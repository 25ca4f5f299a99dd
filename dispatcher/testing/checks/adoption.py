"""Tier *adoption*: a fresh instance, after a restart of the manager, finds and runs everything."""

from __future__ import annotations

import pytest

from dispatcher.plugin.errors import SpecConflict
from dispatcher.plugin.model import Handle
from dispatcher.testing.base import Contract
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.kit import Agent, Kit


class AdoptionChecks(Contract, page="docs/howto/write-a-provider.md"):
    """Nothing that matters is kept in an instance."""

    def test_fresh_instance_finds_all(self, driver: Driver, other: Driver, alice: Agent, bob: Agent) -> None:
        """A fresh instance lists the same agents, and observes them by handles from JSON, as the old one does."""
        here, there = driver.list(), other.list()
        missing = {alice.spec.agent, bob.spec.agent} - set(there)
        expect(not missing, f"a fresh instance does not list {sorted(missing)}: ask the backend")
        expect(
            set(here) == set(there),
            f"a fresh instance lists {sorted(there)}, the old one {sorted(here)}: ask the backend",
        )
        for agent, (handle, seen) in here.items():
            expect(there[agent][0] == handle, f"a fresh instance gives {agent} another handle")
            for found in (there[agent][1], other.observe(Handle.from_json(handle.to_json()))):
                expect(found.state is seen.state, f"a fresh instance sees {agent} as {found.state.value}")
                expect(
                    found.spec_hash == seen.spec_hash,
                    "a fresh instance does not know the spec_hash: store it on the backend",
                )
                expect(found.endpoint == seen.endpoint, f"a fresh instance gives the endpoint {found.endpoint}")

    def test_fresh_instance_keeps_the_process(self, other: Driver, alice: Agent) -> None:
        """`ensure` by a fresh instance adopts, it does not restart; nor does `close`, which can be repeated."""
        start = alice.inside.id()["start"]
        try:
            other.ensure(alice.spec)
        except SpecConflict:
            pytest.fail("a fresh instance does not recognise the spec of its own agent: store spec.hash with it")
        expect(alice.inside.id()["start"] == start, "a fresh instance restarted a running agent: adopt it")
        other.close()
        other.close()
        expect(
            alice.inside.answers() and alice.inside.id()["start"] == start, "close() ended or restarted an agent"
        )

    def test_fresh_instance_ends_and_starts(self, driver: Driver, other: Driver, kit: Kit) -> None:
        """Stop and start work in a fresh instance, from a stored handle; `destroy` from the handle in `list`."""
        agent = kit.start(driver, kit.spec("zoe"))
        other.stop(Handle.from_json(agent.handle.to_json()))
        expect(not agent.inside.answers(), "a fresh instance's stop() did not end the agent")
        again = kit.start(other, agent.spec)
        expect(again.inside.answers(), "a fresh instance could not start the agent again")
        last = self.drive_another(driver.provider)
        found, _ = last.list().get("zoe", (None, None))
        expect(found, "a fresh instance does not list an agent that another one started")
        last.destroy(found)
        kit.gone(last, found)
        last.close()

    def test_installations_are_separate(self, driver: Driver, kit: Kit, alice: Agent) -> None:
        """Two installations on one backend: same agent name, two agents; neither lists or ends the other's."""
        start = alice.inside.id()["start"]
        context = kit.make_context("0123abcd")
        other = self.drive_another(driver.provider, context)
        expect(
            alice.spec.agent not in other.list(),
            "list() yields another installation's agents: filter by the installation's label",
        )
        spec = kit.spec(alice.spec.agent, installation=context.installation)
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
            other.close()
        expect(alice.inside.answers(), "another installation's destroy() ended our agent")
        left = self.leftovers(context)
        expect(not left, f"another installation's destroy() left {sorted(left)} behind")
