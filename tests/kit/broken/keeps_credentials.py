"""A later start gets the credentials of an earlier one."""

from dataclasses import replace
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_credentials_arrive_on_standard_input"
ADVICE = "never store them"


class Broken(FakeProvider):
    kept = {}

    def container(self, spec, handle):
        stdin = spec.stdin or self.kept.get(handle.name)
        self.kept[handle.name] = stdin
        return super().container(replace(spec, stdin=stdin), handle)


class TestBroken(BrokenContract):
    provider_class = Broken
