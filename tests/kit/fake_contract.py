"""The kit over the reference provider, or over one that is broken on purpose."""

import os

import pytest

from dispatcher.testing import ProviderContract
from tests.support.fake_provider import FakeBackend, FakeOptions, FakeProvider


class FakeContract(ProviderContract):
    provider_class = FakeProvider
    patience = 5.0
    silent_seconds = 0.4

    @pytest.fixture
    def provider(self, context):
        provider = self.provider_class(context=context, options=FakeOptions(backend=type(self).__qualname__))
        yield provider
        provider.close()

    @property
    def backend(self):
        return FakeBackend.named(type(self).__qualname__)

    def app_options(self):
        return {"image": "probe"}

    def missing_options(self):
        return {"image": "missing"}

    def leftovers(self, context):
        ours = context.installation
        found = {name for name, one in self.backend.containers.items() if one.labels["installation"] == ours}
        return found | {f"volume {name}" for name in self.backend.volumes if f"-{ours}-" in name}

    def inspect(self, handle, context):
        known = self.backend.containers[handle.name]
        return repr((known.name, known.labels, known.app.environment))

    def broken_backend(self, how):
        return self.backend.outage(how)


class BrokenContract(FakeContract):
    """Impatient at first: it fails anyway."""

    patience = float(os.environ.get("KIT_PATIENCE", "1.5"))
    silent_seconds = 0.3
