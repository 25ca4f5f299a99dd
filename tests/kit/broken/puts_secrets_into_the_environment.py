"""Secrets are environment variables."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_secrets_are_not_exposed"
ADVICE = "is in the app's environment"


class Broken(FakeProvider):
    def environment(self, spec):
        return {**super().environment(spec), **spec.secrets}


class TestBroken(BrokenContract):
    provider_class = Broken
