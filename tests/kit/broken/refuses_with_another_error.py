"""What it does not declare, it refuses with another error."""

from dispatcher.plugin import ProviderError
from dispatcher.plugin import Capability
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_undeclared_is_unsupported[hibernate]"
ADVICE = "raise Unsupported"


class Broken(FakeProvider):
    @property
    def capabilities(self):
        return super().capabilities - {Capability.HIBERNATE}

    def need(self, capability):
        if capability not in self.capabilities:
            raise ProviderError("No")


class TestBroken(BrokenContract):
    provider_class = Broken
