"""It waits for a silent backend as long as it likes."""

from dispatcher.plugin import Deadline
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_silent_backend_meets_the_deadline"
ADVICE = "bound every wait"


class Broken(FakeProvider):
    def observe(self, handle, *, deadline):
        return super().observe(handle, deadline=Deadline(4))


class TestBroken(BrokenContract):
    provider_class = Broken
