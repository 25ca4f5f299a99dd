"""It never waits for a program that it ran."""

import os

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_destroy_leaves_nothing"
ADVICE = "are zombies"


class Broken(FakeProvider):
    def destroy(self, handle, *, data, deadline, progress):
        super().destroy(handle, data=data, deadline=deadline, progress=progress)
        os.posix_spawn("/bin/true", ["true"], {})


class TestBroken(BrokenContract):
    provider_class = Broken
