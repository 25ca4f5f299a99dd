"""stop() reports its progress, seldom."""

import time

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_stop_kills_after_the_grace_time"
ADVICE = "at least once a second"


class Broken(FakeProvider):
    def wait(self, grace, deadline, progress):
        time.sleep(2.3 + TestBroken.slack)
        progress("stopping")


class TestBroken(BrokenContract):
    provider_class = Broken
