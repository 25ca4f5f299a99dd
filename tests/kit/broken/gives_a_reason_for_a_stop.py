"""After stop() it reports that the app was killed."""

from dataclasses import replace

from dispatcher.plugin import BackendState
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_stop_and_start_again"
ADVICE = "leave it empty"


class Broken(FakeProvider):
    def observation(self, known):
        seen = super().observation(known)
        return replace(seen, exit_reason="killed by signal 15") if seen.state is BackendState.STOPPED else seen


class TestBroken(BrokenContract):
    provider_class = Broken
