"""It does not notice that the spec changed."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_other_spec_conflicts"
ADVICE = "compare spec.hash"


class Broken(FakeProvider):
    def ensure(self, spec, *, deadline, progress):
        known = self.backend.containers.get(spec.backend_name)
        if known and known.state == "running":
            return self.handle(spec)
        return super().ensure(spec, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken
