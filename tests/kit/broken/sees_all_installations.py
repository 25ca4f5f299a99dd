"""It lists every agent of the backend."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_installations_are_separate"
ADVICE = "installation's label"


class Broken(FakeProvider):
    def is_ours(self, known):
        return True


class TestBroken(BrokenContract):
    provider_class = Broken
