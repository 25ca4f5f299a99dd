"""It gives the first lines of the log for the last."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_logs_tail"
ADVICE = "rather than the last three lines"


class Broken(FakeProvider):
    @staticmethod
    def lines(known, tail, follow):
        return iter(list(known.log)[:tail])


class TestBroken(BrokenContract):
    provider_class = Broken
