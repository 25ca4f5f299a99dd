"""Its start times are milliseconds."""

from dataclasses import replace

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_ensure_runs_and_answers"
ADVICE = "give Unix time in seconds"


class Broken(FakeProvider):
    def observation(self, known):
        seen = super().observation(known)
        return replace(seen, started_at=seen.started_at * 1000)


class TestBroken(BrokenContract):
    provider_class = Broken
