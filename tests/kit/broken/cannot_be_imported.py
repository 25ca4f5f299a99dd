"""Its entry point names a module that does not exist."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract, entry

CHECK = "test_hook_returns_the_class"
ADVICE = "does not load: .*cannot be imported"


class Broken(FakeProvider):
    pass


class TestBroken(BrokenContract):
    provider_class = Broken
    entries = (entry("no_such_module_anywhere"),)
