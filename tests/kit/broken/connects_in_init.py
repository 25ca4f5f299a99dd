"""Its constructor waits for the backend."""

import time

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_init_does_not_connect"
ADVICE = "connect in check()"


class Broken(FakeProvider):
    def __init__(self, *, context, options):
        super().__init__(context=context, options=options)
        time.sleep(1.2)


class TestBroken(BrokenContract):
    provider_class = Broken
