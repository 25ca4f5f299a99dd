"""It looks at what it started, not at what runs."""

from dataclasses import replace

from dispatcher.plugin import BackendState
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_exit_is_reported"
ADVICE = "is still RUNNING"


class Broken(FakeProvider):
    def observation(self, known):
        return replace(super().observation(known), state=BackendState.RUNNING, endpoint=known.app.endpoint)


class TestBroken(BrokenContract):
    provider_class = Broken
