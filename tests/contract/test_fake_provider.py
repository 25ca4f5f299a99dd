"""The reference provider passes its own kit, with the canonical data directory and with data of its own."""

import pytest

from dispatcher.model import Capability
from dispatcher.testing import ProviderContract
from dispatcher.testing.fake import FakeBackend, FakeOptions, FakeProvider
from dispatcher.testing.fake_backend import ALL


class FakeContract(ProviderContract):
    backend_name = ""
    patience = 5.0

    @pytest.fixture
    def provider(self, context):
        provider = FakeProvider(context=context, options=FakeOptions(backend=self.backend_name))
        yield provider
        provider.close()

    @property
    def backend(self):
        return FakeBackend.named(self.backend_name)

    def app_options(self):
        return {"image": "probe"}

    def missing_options(self):
        return {"image": "missing"}

    def leftovers(self, installation):
        ours = {name for name, one in self.backend.containers.items() if one.labels["installation"] == installation}
        return ours | {f"volume {name}" for name in self.backend.volumes if f"-{installation}-" in name}

    def inspect(self, handle):
        known = self.backend.containers[handle.name]
        return repr((known.name, known.labels, known.app.environment))

    def broken_backend(self, how):
        return self.backend.outage(how)


class TestFake(FakeContract):
    backend_name = "contract"


class TestFakeWithoutCapabilities(FakeContract):
    backend_name = "contract-plain"

    @pytest.fixture(autouse=True)
    def plain(self):
        self.backend.capabilities = frozenset({Capability.NETWORK_NONE})


class TestFakeWithOwnData(FakeContract):
    backend_name = "contract-own-data"

    @pytest.fixture(autouse=True)
    def own_data(self):
        self.backend.capabilities = ALL | {Capability.OWN_DATA}
