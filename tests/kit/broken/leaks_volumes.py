"""destroy() leaves something of every agent."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_destroy_leaves_nothing"
ADVICE = "left .*volume"


class Broken(FakeProvider):
    def destroy(self, handle, *, data, deadline, progress):
        super().destroy(handle, data=data, deadline=deadline, progress=progress)
        self.backend.volumes[handle.name] = self.context.state_dir


class TestBroken(BrokenContract):
    provider_class = Broken
