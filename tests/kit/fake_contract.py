"""The kit over the reference provider, or over one that is broken on purpose."""

import os
import types
from importlib.metadata import EntryPoint

import pytest

from dispatcher.config import plugins
from dispatcher.config.plugins import GROUP
from dispatcher.plugin import hookimpl
from dispatcher.testing import ProviderContract
from dispatcher.testing import declared
from tests.support.fake_provider import FakeBackend, FakeOptions, FakeProvider


def entry(module):
    """Return an entry point of the reference provider's name."""
    return EntryPoint("fake", module, GROUP)


class Declared(EntryPoint):
    """The entry point of a class that is in no module of its own."""

    def load(self):
        return types.SimpleNamespace(dispatcher_register_providers=hookimpl(lambda: [self.registered]))


class FakeContract(ProviderContract):
    provider_class = FakeProvider
    entries = None  # the installed entry points, by default one of the class
    patience = 5.0
    silent_seconds = 0.4

    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch):
        found = self.entries
        if found is None:
            found = (Declared("fake", "declared", GROUP),)
            vars(found[0])["registered"] = self.provider_class
        for module in (plugins, declared):
            monkeypatch.setattr(module, "installed", lambda: list(found))

    @pytest.fixture
    def provider(self, context):
        provider = self.provider_class(context=context, options=FakeOptions(backend=type(self).__qualname__))
        yield provider
        provider.close()

    @property
    def backend(self):
        return FakeBackend.named(type(self).__qualname__)

    def app_options(self):
        return {"image": "probe", "arguments": ["{data}"]}

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
    slack = patience / 3
    silent_seconds = 0.3
