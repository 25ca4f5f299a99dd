"""resume() starts the agent anew."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_sleep_keeps_memory[ram]"
ADVICE = "the memory must be kept"


class Broken(FakeProvider):
    def wake(self, known):
        super().wake(known)
        known.app.start, known.app.count = "anew", 0


class TestBroken(BrokenContract):
    provider_class = Broken
