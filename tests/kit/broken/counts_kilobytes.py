"""It tells memory in kilobytes."""

from dataclasses import replace
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_usage_reports_memory_and_cpu"
ADVICE = "in bytes"


class Broken(FakeProvider):
    def usage(self, handles, *, deadline):
        found = super().usage(handles, deadline=deadline)
        return {name: replace(one, memory=one.memory // 1024) for name, one in found.items()}


class TestBroken(BrokenContract):
    provider_class = Broken
