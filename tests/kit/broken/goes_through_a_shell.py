"""It hands the environment through something that reads it."""

import os

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_environment_arrives"
ADVICE = "never go through a shell"


class Broken(FakeProvider):
    def environment(self, spec):
        return {key: os.path.expandvars(value) for key, value in super().environment(spec).items()}


class TestBroken(BrokenContract):
    provider_class = Broken
