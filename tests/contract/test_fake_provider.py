"""The reference provider passes its own kit: with all capabilities, with none, and with data of its own."""

import pytest

from dispatcher.plugin.model import Capability
from tests.support.fake_backend import ALL
from tests.kit.fake_contract import FakeContract


class TestFake(FakeContract):
    pass


class TestFakeWithoutCapabilities(FakeContract):
    @pytest.fixture(autouse=True)
    def plain(self):
        self.backend.capabilities = frozenset({Capability.NETWORK_NONE})


class TestFakeWithOwnData(FakeContract):
    @pytest.fixture(autouse=True)
    def own_data(self):
        self.backend.capabilities = ALL | {Capability.OWN_DATA}
