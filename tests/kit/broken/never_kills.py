"""It never uses force."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_stop_kills_after_the_grace_time"
ADVICE = "survived stop()"


class Broken(FakeProvider):
    def stop(self, handle, *, grace, deadline, progress):
        known = self.backend.containers.get(handle.name)
        if not (known and known.app.environment.get("PROBE_IGNORES_SIGTERM")):
            super().stop(handle, grace=grace, deadline=deadline, progress=progress)


class TestBroken(BrokenContract):
    provider_class = Broken
