"""One start holds a lock that all need."""

import threading

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_slow_start_delays_no_other"
ADVICE = "hold no lock that all agents share"


class Broken(FakeProvider):
    lock = threading.Lock()

    def ensure(self, spec, *, deadline, progress):
        with self.lock:
            return super().ensure(spec, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken
