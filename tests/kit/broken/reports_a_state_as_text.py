"""Its states are texts."""

from dataclasses import replace

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_ensure_runs_and_answers"
ADVICE = "state is 'running', expected a BackendState"


class Broken(FakeProvider):
    def observation(self, known):
        seen = super().observation(known)
        return replace(seen, state=seen.state.value)


class TestBroken(BrokenContract):
    provider_class = Broken
