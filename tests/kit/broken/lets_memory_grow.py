"""It declares a memory limit and enforces none."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_memory_limit"
ADVICE = "enforce Limits.memory"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.app.limits["memory"] = None
        return container


class TestBroken(BrokenContract):
    provider_class = Broken
