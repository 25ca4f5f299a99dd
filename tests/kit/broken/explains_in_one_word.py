"""What it explains says nothing."""

from dispatcher.plugin import Finding
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_explain_describes_isolation"
ADVICE = "make `what` a sentence"


class Broken(FakeProvider):
    def explain(self, app):
        return [Finding.ok("isolated")]


class TestBroken(BrokenContract):
    provider_class = Broken
