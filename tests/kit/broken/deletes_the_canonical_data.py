"""destroy() deletes the core's directory."""

import shutil

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_destroy_spares_the_canonical_data"
ADVICE = "that is the core's to delete"


class Broken(FakeProvider):
    def container(self, spec, handle):
        container = super().container(spec, handle)
        container.labels["data"] = str(spec.data_dir)
        return container

    def destroy(self, handle, *, data, deadline, progress):
        known = self.backend.containers.get(handle.name)
        super().destroy(handle, data=data, deadline=deadline, progress=progress)
        if data and known:
            shutil.rmtree(known.labels["data"])


class TestBroken(BrokenContract):
    provider_class = Broken
