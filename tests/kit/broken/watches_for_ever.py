"""It reports changes after close()."""

import contextlib

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_events_report_an_exit"
ADVICE = "still reports after close"


class Broken(FakeProvider):
    def watch(self, on_change):
        super().watch(on_change)
        return contextlib.ExitStack()

    def destroy(self, handle, *, data, deadline, progress):
        super().destroy(handle, data=data, deadline=deadline, progress=progress)
        self.backend.notify(handle.name)


class TestBroken(BrokenContract):
    provider_class = Broken
