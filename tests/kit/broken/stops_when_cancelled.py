"""stop() goes on when it is cancelled."""

import contextlib

from dispatcher.plugin import Cancelled
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_stop_kills_after_the_grace_time"
ADVICE = "swallowed Cancelled"


class Broken(FakeProvider):
    def wait(self, grace, deadline, progress):
        with contextlib.suppress(Cancelled):
            super().wait(grace, deadline, progress)


class TestBroken(BrokenContract):
    provider_class = Broken
