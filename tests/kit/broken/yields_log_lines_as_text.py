"""Its log lines are texts."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_logs_tail"
ADVICE = "logs.. must yield bytes, not str"


class Broken(FakeProvider):
    @staticmethod
    def lines(known, tail, follow):
        return (line.decode() for line in FakeProvider.lines(known, tail, follow))


class TestBroken(BrokenContract):
    provider_class = Broken
