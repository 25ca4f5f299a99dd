"""observe() never returns."""

import threading

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_absent_is_absent"
ADVICE = "observe.. has not returned"


class Broken(FakeProvider):
    def observe(self, handle, *, deadline):
        threading.Event().wait()


class TestBroken(BrokenContract):
    provider_class = Broken
