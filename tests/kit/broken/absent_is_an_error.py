"""It cannot stop what is not there."""

from tests.support.fake_provider import FakeProvider, translated
from tests.kit.fake_contract import BrokenContract

CHECK = "test_absent_stop_is_success"
ADVICE = "absent is success"


class Broken(FakeProvider):
    def stop(self, handle, *, grace, deadline, progress):
        with translated():
            self.backend.get(handle.name)
        super().stop(handle, grace=grace, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken
