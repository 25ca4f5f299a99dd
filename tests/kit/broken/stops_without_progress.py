"""stop() waits for the whole grace time, cancelled or not."""

from dispatcher.plugin import no_progress
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_stop_kills_after_the_grace_time"
ADVICE = "called progress 1 times"


class Broken(FakeProvider):
    def wait(self, grace, deadline, progress):
        super().wait(grace, deadline, no_progress)


class TestBroken(BrokenContract):
    provider_class = Broken
