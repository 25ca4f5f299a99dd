"""Agents reach each other's endpoints."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_cannot_reach_the_other_endpoint"
ADVICE = "can connect to another's endpoint"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.app.may_connect = lambda to: True
        return container


class TestBroken(BrokenContract):
    provider_class = Broken
