"""It does not remember of which spec an agent is."""

from dataclasses import replace

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_ensure_runs_and_answers"
ADVICE = "spec_hash is not spec.hash"


class Broken(FakeProvider):
    def observation(self, known):
        return replace(super().observation(known), spec_hash="")


class TestBroken(BrokenContract):
    provider_class = Broken
