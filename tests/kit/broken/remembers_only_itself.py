"""It lists what this instance started."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_fresh_instance_finds_all"
ADVICE = "ask the backend"


class Broken(FakeProvider):
    def ensure(self, spec, *, deadline, progress):
        handle = super().ensure(spec, deadline=deadline, progress=progress)
        self.__dict__.setdefault("mine", set()).add(handle.name)
        return handle

    def is_ours(self, known):
        return known.name in self.__dict__.get("mine", ())


class TestBroken(BrokenContract):
    provider_class = Broken
