"""Apps have the umask of most machines."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_umask_is_007"
ADVICE = "set 007"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.app.umask = 0o022
        return container


class TestBroken(BrokenContract):
    provider_class = Broken
