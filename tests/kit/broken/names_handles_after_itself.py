"""Its handles have another provider's name."""

from dataclasses import replace

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_handle_is_pure"
ADVICE = "use the class.s name"


class Broken(FakeProvider):
    def handle(self, spec):
        return replace(super().handle(spec), provider="other")


class TestBroken(BrokenContract):
    provider_class = Broken
