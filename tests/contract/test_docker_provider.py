"""The Docker provider passes the conformance kit against a real engine: with bind mounts and with volumes."""

import pytest

from dispatcher.testing import ProviderContract
from dispatcher_docker.options import DockerOptions
from dispatcher_docker.provider import DockerProvider
from tests.docker_tools import Relay, docker, images, leftovers

pytestmark = [pytest.mark.docker, pytest.mark.root]


class DockerContract(ProviderContract):
    data = "bind"
    patience = 20.0

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
        return {"image": "dispatcher-test/probe", "command": ["python3", "/probe.py", "--unix", "{socket}"]}

    def missing_options(self):
        return {"image": "dispatcher-test/none-such", "pull": "never"}

    def leftovers(self, installation):
        return leftovers(installation)

    def inspect(self, handle):
        return docker("inspect", handle.name) + docker("ps", "-a", "--no-trunc")

    def broken_backend(self, how):
        return self.front.broken(how)

    def backend_sockets(self):
        return [f"unix:{self.front.path}", "unix:/run/containerd/containerd.sock"]


class TestDocker(DockerContract):
    pass
