"""Its hook returns another class than the one that is tested."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract, entry

CHECK = "test_hook_returns_the_class"
ADVICE = "test what is installed"


class Broken(FakeProvider):
    pass


class TestBroken(BrokenContract):
    provider_class = Broken
    entries = (entry("tests.support.fake_provider"),)
