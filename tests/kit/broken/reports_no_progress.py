"""It never tells its progress, so nobody can cancel."""

from dispatcher.plugin import no_progress
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_progress_is_reported"
ADVICE = "never called progress"


class Broken(FakeProvider):
    def ensure(self, spec, *, deadline, progress):
        return super().ensure(spec, deadline=deadline, progress=no_progress)


class TestBroken(BrokenContract):
    provider_class = Broken
