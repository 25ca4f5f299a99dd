"""The Docker provider on Podman's Docker API, rootful: checks of the conformance kit.

The whole kit takes four minutes; WHOLE_KIT=1 runs it.  Else the checks run where Podman differs from Docker, and
those of each feature.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from dispatcher.plugin import BackendState, Network
from dispatcher.testing import ProviderContract
from dispatcher.testing.kit import eventually
from tests.contract.test_docker_provider import OnDocker
from tests.support.docker_tools import Relay, docker, images, leftovers
from tests.support.outside import Outside
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

    def test_an_end_that_conmon_does_not_report_is_noticed(self, driver, kit):
        """conmon was killed (for memory, say), then the app ended: Podman goes on listing it as running."""
        agent = kit.start(driver, kit.spec("kate"))
        pid = json.loads(self.inspect(agent.handle, kit.context).partition("\n]")[0] + "]")[0]["State"]["Pid"]
        conmon = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert Path(f"/proc/{conmon}/comm").read_text() == "conmon\n"
        os.kill(conmon, signal.SIGKILL)
        assert driver.state(agent.handle) is BackendState.RUNNING
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: driver.state(agent.handle) is BackendState.STOPPED, 10)
        _, listed = driver.list()["kate"]
        assert (listed.state, "conmon" in listed.exit_reason) == (BackendState.STOPPED, True)
        kit.start(driver, agent.spec)

    def test_storage_that_a_killed_podman_left_does_not_keep_the_name(self, driver, kit):
        """Podman ended while it created a container: its storage has the name, its list does not."""
        spec = kit.spec("leo")
        name = driver.handle(spec).name
        (database,) = (self.podman.base / "root").glob("libpod/*.db")
        saved = database.read_bytes()
        docker(
            "create",
            "--userns",
            "host",
            "--name",
            name,
            "localhost/dispatcher-test/probe",
            "x",
            host=self.podman.url,
        )
        self.podman.stop()
        database.write_bytes(saved)
        self.podman.start()
        assert not docker("ps", "-a", "-q", "--filter", f"name={name}", host=self.podman.url)
        kit.start(driver, spec)

    def test_private_networks_are_many_and_do_not_reach_metadata(self, driver, kit):
        """Podman's netavark accepts what containers forward with the first rule of the chain FORWARD."""
        command = ["python3", "/probe.py", "--tcp", "0.0.0.0:{port}", "{data}"]
        options = self.app_options() | {"port": 8080, "command": command}
        specs = [kit.spec(name, options=options, network=Network.PRIVATE) for name in ("mia", "noah")]
        agents = [kit.start(driver, spec) for spec in specs]
        accept = ["FORWARD", "-i", f"dsp-{kit.context.installation}+", "-j", "ACCEPT"]
        subprocess.run(["iptables", "-I", *accept], check=True)
        try:
            with Outside("169.254.169.254") as outside:
                connect = lambda to: agents[1].inside.refused("/connect", to=f"tcp:{to}:{outside.port}")
                assert connect(outside.address) == ""
                assert connect("169.254.169.254")
        finally:
            subprocess.run(["iptables", "-D", *accept], check=True)


if not os.environ.get("WHOLE_KIT"):
    for name in dir(ProviderContract):
        if name.startswith("test_") and name.removeprefix("test_") not in CHECKS.split():
            setattr(TestPodman, name, None)
