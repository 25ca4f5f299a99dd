"""Its errors carry what is not JSON."""

from dispatcher.plugin import ProviderError
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_missing_image_is_a_provider_error"
ADVICE = "`details` are not JSON"


class Broken(FakeProvider):
    def image(self, app):
        if app.options.image == "missing":
            raise ProviderError("There is no image", fix="set another", details={"image": object()})


class TestBroken(BrokenContract):
    provider_class = Broken
