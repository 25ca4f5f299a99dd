"""Its log lines have their ends."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_logs_tail"
ADVICE = "strip the newline"


class Broken(FakeProvider):
    @staticmethod
    def lines(known, tail, follow):
        return (line + b"\n" for line in FakeProvider.lines(known, tail, follow))


class TestBroken(BrokenContract):
    provider_class = Broken
