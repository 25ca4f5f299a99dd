"""stop() gives the app its grace time, whatever the deadline is."""

from dispatcher.plugin import Deadline
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_stop_kills_after_the_grace_time"
ADVICE = "bound every wait"


class Broken(FakeProvider):
    def wait(self, grace, deadline, progress):
        super().wait(grace, Deadline(60), progress)


class TestBroken(BrokenContract):
    provider_class = Broken
