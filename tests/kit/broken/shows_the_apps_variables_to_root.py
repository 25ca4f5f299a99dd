"""What runs as root before the app gets the app's variables."""

from tests.support.fake_provider import FakeProvider
from tests.kit.fake_contract import BrokenContract

CHECK = "test_variables_are_for_the_app_alone"
ADVICE = "pass them behind the change of user"
ROOT = "only root's files differ from the agent's"


class Broken(FakeProvider):
    def container(self, spec, handle):
        if "LD_DEBUG_OUTPUT" in spec.app.environment:
            (spec.data_dir / "ran.1").touch()  # as the loader does
        return super().container(spec, handle)


class TestBroken(BrokenContract):
    provider_class = Broken
