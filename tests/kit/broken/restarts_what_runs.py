"""ensure() restarts a running agent."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_ensure_twice_is_one_agent"
ADVICE = "restarted it"


class Broken(FakeProvider):
    def ensure(self, spec, *, deadline, progress):
        self.stop(self.handle(spec), grace=0, deadline=deadline, progress=progress)
        return super().ensure(spec, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken
