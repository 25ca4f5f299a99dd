"""It cuts long names, so that two agents share one."""

from dispatcher.plugin import Handle
from dispatcher.plugin import slug
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_handles_do_not_collide"
ADVICE = "two agents got one backend name"


class Broken(FakeProvider):
    def handle(self, spec):
        return Handle(provider=self.name, agent=spec.agent, name=f"agent-{slug(spec.agent)}")


class TestBroken(BrokenContract):
    provider_class = Broken
