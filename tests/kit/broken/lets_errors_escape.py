"""The backend's own errors come out of it."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_absent_is_absent"
ADVICE = "escape"


class Broken(FakeProvider):
    def observe(self, handle, *, deadline):
        return self.observation(self.backend.get(handle.name))


class TestBroken(BrokenContract):
    provider_class = Broken
