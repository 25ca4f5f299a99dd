"""It says that it suspended an agent that does not exist."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_suspend_of_absent_is_not_found"
ADVICE = "raise NotFound"


class Broken(FakeProvider):
    def suspend(self, handle, *, depth, deadline, progress):
        if handle.name in self.backend.containers:
            super().suspend(handle, depth=depth, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken
