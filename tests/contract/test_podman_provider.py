"""The Docker provider on Podman's Docker API, rootful: checks of the conformance kit.

The whole kit takes four minutes; WHOLE_KIT=1 runs it.  Else the checks run where Podman differs from Docker, and
those of each feature.
"""

import os

import pytest

from dispatcher.testing import ProviderContract
from tests.contract.test_docker_provider import OnDocker
from tests.support.docker_tools import Relay, docker, images, leftovers
from tests.support.podman import Podman

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.program("podman", "conmon", "catatonit", "runc")]

CHECKS = """
    check_accepts_the_backend ensure_runs_and_answers exit_is_reported sleep_keeps_memory logs_tail logs_follow
    usage_reports_memory_and_cpu memory_limit events_report_an_exit has_no_privileges
    cannot_open_sockets_that_no_namespace_separates readers_beside_writers
"""


class OnPodman(OnDocker):
    """What an author fills in, for Podman."""

    @pytest.fixture(scope="class")
    @classmethod
    def relay(cls):
        images()
        cls.podman = Podman("dispatcher-test/probe")
        cls.front = Relay(str(cls.podman.socket))
        yield cls.front
        cls.front.close()
        cls.podman.close()

    def app_options(self):
        return {**super().app_options(), "image": "localhost/dispatcher-test/probe"}

    def leftovers(self, context):
        return leftovers(context.installation, self.podman.url)

    def inspect(self, handle, context):
        url = self.podman.url
        return docker("inspect", handle.name, host=url) + docker("ps", "-a", "--no-trunc", host=url)

    def backend_sockets(self):
        return [f"unix:{self.front.path}", f"unix:{self.podman.socket}"]


class TestPodman(OnPodman, ProviderContract):
    def test_its_name_is_told(self, provider, driver):
        driver.check()
        assert any("containers of the Podman engine" in one.what for one in provider.explain(None))


if not os.environ.get("WHOLE_KIT"):
    for name in dir(ProviderContract):
        if name.startswith("test_") and name.removeprefix("test_") not in CHECKS.split():
            setattr(TestPodman, name, None)
