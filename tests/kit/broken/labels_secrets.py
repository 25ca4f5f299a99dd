"""Secrets are in the labels that the backend shows."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_secrets_are_not_exposed"
ADVICE = "backend's inspection"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.labels.update(spec.secrets)
        return container


class TestBroken(BrokenContract):
    provider_class = Broken
