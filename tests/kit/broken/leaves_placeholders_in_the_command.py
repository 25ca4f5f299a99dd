"""Placeholders in the command are not replaced, but {socket}."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_placeholders_in_the_command_are_replaced"
ADVICE = "arrived as '.data.'"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.app.argv = ("probe", *spec.app.options.arguments)
        return container


class TestBroken(BrokenContract):
    provider_class = Broken
