"""It tells when the container was made for when it was started, though it starts a stopped one again."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_stop_and_start_again"
ADVICE = "None is valid"


class Broken(FakeProvider):
    def ensure(self, spec, *, deadline, progress):
        handle = super().ensure(spec, deadline=deadline, progress=progress)
        made = self.backend.containers[handle.name].started_at
        self.__dict__.setdefault("made", {}).setdefault(handle.name, made)
        return handle

    def list(self, *, deadline):
        for handle, seen in super().list(deadline=deadline):
            object.__setattr__(seen, "started_at", self.made[handle.name])
            yield handle, seen


class TestBroken(BrokenContract):
    provider_class = Broken
