"""No distribution has an entry point of its name."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_entry_point_is_declared_once"
ADVICE = "pip install"


class Broken(FakeProvider):
    pass


class TestBroken(BrokenContract):
    provider_class = Broken
    entries = ()
