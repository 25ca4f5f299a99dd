"""One of its methods has other names of arguments."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_signatures_are_the_contract"
ADVICE = "stop.. does not take grace"


class Broken(FakeProvider):
    def stop(self, handle, *, timeout=1.0, deadline, progress):
        super().stop(handle, grace=timeout, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken
