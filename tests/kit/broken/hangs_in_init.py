"""Its constructor never returns, so the author's own fixture hangs."""

import time

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_init_does_not_connect"
ADVICE = r"the fixture `provider` has not returned after .* connect in check\(\)"


class Broken(FakeProvider):
    def __init__(self, *, context, options):
        super().__init__(context=context, options=options)
        while True:
            try:
                time.sleep(3600)
            except Exception:  # noqa: S110 - as clients do that try again
                pass


class TestBroken(BrokenContract):
    provider_class = Broken
