"""A backend that is down makes it say that agents are stopped."""

from dispatcher.plugin import Unavailable
from dispatcher.plugin import BackendState, Observation
from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_backend_down_is_unavailable"
ADVICE = "it never becomes stopped"


class Broken(FakeProvider):
    def observe(self, handle, *, deadline):
        try:
            return super().observe(handle, deadline=deadline)
        except Unavailable:
            return Observation(state=BackendState.STOPPED)


class TestBroken(BrokenContract):
    provider_class = Broken
