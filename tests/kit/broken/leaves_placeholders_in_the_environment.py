"""Placeholders in the environment are not replaced."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_placeholders_in_the_environment_are_replaced"
ADVICE = "arrived as '<.data.>'"


class Broken(FakeProvider):
    def environment(self, spec):
        return {**super().environment(spec), **spec.app.environment}


class TestBroken(BrokenContract):
    provider_class = Broken
