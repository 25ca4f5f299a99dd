"""The cause of its errors is the exception itself."""

from dispatcher.plugin import ProviderError
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_missing_image_is_a_provider_error"
ADVICE = "whose `why` is of type ValueError"


class Broken(FakeProvider):
    def image(self, app):
        if app.options.image == "missing":
            raise ProviderError("There is no image", why=ValueError("missing"), fix="set another")


class TestBroken(BrokenContract):
    provider_class = Broken
