"""capabilities never returns."""

import threading

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_capabilities_are_constant_and_quick"
ADVICE = "capabilities has not returned"


class Broken(FakeProvider):
    @property
    def capabilities(self):
        threading.Event().wait()


class TestBroken(BrokenContract):
    provider_class = Broken
