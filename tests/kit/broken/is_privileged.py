"""Agents keep capabilities."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_has_no_privileges"
ADVICE = "drop all capabilities"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.app.privileged = True
        return container


class TestBroken(BrokenContract):
    provider_class = Broken
