"""Its events end with the first outage."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_watch_survives_the_backend"
ADVICE = "did not report a gap"


class Broken(FakeProvider):
    def watch(self, on_change):
        def until_an_outage(name):
            if not name:
                watch.close()
            else:
                on_change(name)

        watch = super().watch(until_an_outage)
        return watch


class TestBroken(BrokenContract):
    provider_class = Broken
