"""The Docker provider passes the conformance kit against a real engine: with bind mounts and with volumes."""

import pytest

from dispatcher.plugin.model import Network
from dispatcher.testing import ProviderContract
from dispatcher.testing.checks.concurrency import ConcurrencyChecks
from dispatcher.testing.checks.isolation import IsolationChecks
from dispatcher.testing.checks.leaks import LeakChecks
from dispatcher.testing.checks.lifecycle import LifecycleChecks
from dispatcher.testing.checks.promises import PromiseChecks
from dispatcher_docker.options import DockerOptions
from dispatcher_docker.provider import DockerProvider
from tests.support.docker_tools import Relay, docker, images, leftovers

pytestmark = [pytest.mark.docker, pytest.mark.root]


class OnDocker:
    """What an author fills in, for Docker."""

    data = "bind"
    patience = 20.0
    umask_of_image = "the engine sets it"

    @pytest.fixture(scope="class")
    @classmethod
    def relay(cls):
        images()
        cls.front = Relay()
        yield cls.front
        cls.front.close()

    @pytest.fixture
    def provider(self, context, relay):
        provider = DockerProvider(context=context, options=DockerOptions(url=relay.url, data=self.data))
        yield provider
        provider.close()

    def app_options(self):
        return {
            "image": "dispatcher-test/probe",
            "command": ["python3", "/probe.py", "--unix", "{socket}", "{data}"],
        }

    def missing_options(self):
        return {"image": "dispatcher-test/none-such", "pull": "never"}

    def leftovers(self, context):
        return leftovers(context.installation)

    def inspect(self, handle, context):
        return docker("inspect", handle.name) + docker("ps", "-a", "--no-trunc")

    def broken_backend(self, how):
        return self.front.broken(how)

    def backend_sockets(self):
        return [f"unix:{self.front.path}", "unix:/run/containerd/containerd.sock"]


class TestDocker(OnDocker, ProviderContract):
    """The whole kit: a Unix socket, no network, the core's own directory."""


class TestDockerVolumes(OnDocker, LifecycleChecks, PromiseChecks, IsolationChecks, LeakChecks):
    """The tiers that meet an agent's data, kept in volumes of the engine."""

    data = "volume"


class TestDockerPorts(OnDocker, IsolationChecks, ConcurrencyChecks):
    """The tiers that meet an agent's endpoint, published on a loopback port, on a bridge."""

    network = Network.PRIVATE

    def app_options(self):
        command = ["python3", "/probe.py", "--tcp", "0.0.0.0:{port}", "{data}"]
        return {"image": "dispatcher-test/probe", "command": command, "port": 8080}
