"""No agent starts."""

from dispatcher.plugin import ProviderError
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_ensure_runs_and_answers"
ADVICE = "starting an agent ended with ProviderError .No space: the disk is full"


class Broken(FakeProvider):
    def ensure(self, spec, *, deadline, progress):
        raise ProviderError("No space", why="the disk is full", fix="free some")


class TestBroken(BrokenContract):
    provider_class = Broken
