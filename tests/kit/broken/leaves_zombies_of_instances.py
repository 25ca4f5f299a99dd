"""Every instance leaves a program that nobody waits for."""

import os

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_instances_release_everything"
ADVICE = r"left \d+ zombies"


class Broken(FakeProvider):
    def close(self):
        super().close()
        os.posix_spawn("/bin/true", ["true"], {})


class TestBroken(BrokenContract):
    provider_class = Broken
