"""destroy() deletes its own data, asked or not."""

import pytest

from dispatcher.plugin import Capability
from tests.support.fake_backend import ALL
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_data_of_the_removed_is_not_inherited"
ADVICE = "remove the agent alone"


class Broken(FakeProvider):
    def destroy(self, handle, *, data, deadline, progress):
        super().destroy(handle, data=True, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken

    @pytest.fixture(autouse=True)
    def own_data(self):
        self.backend.capabilities = ALL | {Capability.OWN_DATA}
