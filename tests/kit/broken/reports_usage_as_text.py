"""Its usage is made for people."""

from dispatcher.plugin import Usage
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_usage_reports_memory_and_cpu"
ADVICE = "memory is '8 MiB', expected a number"


class Broken(FakeProvider):
    def usage(self, handles, *, deadline):
        return {name: Usage(memory="8 MiB") for name in super().usage(handles, deadline=deadline)}


class TestBroken(BrokenContract):
    provider_class = Broken
