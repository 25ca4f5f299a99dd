"""list() ends the process."""

import sys

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_absent_is_absent"
ADVICE = "let builtins.SystemExit escape"


class Broken(FakeProvider):
    def list(self, *, deadline):
        sys.exit(3)


class TestBroken(BrokenContract):
    provider_class = Broken
