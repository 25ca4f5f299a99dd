"""Every instance leaves a thread."""

import threading
import time

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_instances_release_everything"
ADVICE = "threads"


class Broken(FakeProvider):
    def check(self, *, deadline):
        super().check(deadline=deadline)
        threading.Thread(target=time.sleep, args=(8,), daemon=True).start()


class TestBroken(BrokenContract):
    provider_class = Broken
