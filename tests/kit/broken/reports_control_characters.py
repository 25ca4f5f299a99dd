"""Its exit reason is what the app wrote."""

from dataclasses import replace

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_exit_is_reported"
ADVICE = "without control characters"


class Broken(FakeProvider):
    def observation(self, known):
        seen = super().observation(known)
        return replace(seen, exit_reason=f"{seen.exit_reason}\x1b[2J") if seen.exit_reason else seen


class TestBroken(BrokenContract):
    provider_class = Broken
