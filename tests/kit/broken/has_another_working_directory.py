"""Apps start in the root directory."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_working_directory_is_the_data"
ADVICE = "change to its data directory"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.app.cwd = "/"
        return container


class TestBroken(BrokenContract):
    provider_class = Broken
