"""A cancelled start leaves its container."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_cancel_leaves_nothing[3]"
ADVICE = "still yields an agent|it must return ABSENT|left"


class Broken(FakeProvider):
    def create(self, spec, handle, known, deadline, progress):
        container = self.container(spec, handle)
        progress("creating")
        self.backend.containers[handle.name] = container
        container.app.run()
        progress("started")


class TestBroken(BrokenContract):
    provider_class = Broken
