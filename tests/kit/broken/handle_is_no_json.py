"""Its handles hold what JSON changes."""

from dataclasses import replace
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_handle_survives_json"
ADVICE = "use lists rather than tuples"


class Broken(FakeProvider):
    def handle(self, spec):
        return replace(super().handle(spec), data={"ids": (spec.uid, spec.gid)})


class TestBroken(BrokenContract):
    provider_class = Broken
