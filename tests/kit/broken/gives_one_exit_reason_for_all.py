"""Whatever the app's exit code is, it reports the same."""

from dataclasses import replace

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_exit_is_reported"
ADVICE = "ended with code 11"


class Broken(FakeProvider):
    def observation(self, known):
        seen = super().observation(known)
        return replace(seen, exit_reason="exit code 7") if seen.exit_reason else seen


class TestBroken(BrokenContract):
    provider_class = Broken
