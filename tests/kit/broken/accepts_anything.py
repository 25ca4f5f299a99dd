"""Its options let misspelt keys through."""

from pydantic import ConfigDict

from tests.support.fake_provider import FakeAppOptions
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_unknown_option_is_refused_with_its_path[app]"
ADVICE = 'extra="forbid"'


class Broken(FakeProvider):
    class AppOptions(FakeAppOptions):
        model_config = ConfigDict(extra="ignore")


class TestBroken(BrokenContract):
    provider_class = Broken
