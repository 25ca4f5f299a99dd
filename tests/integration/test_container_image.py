"""The container image: manager and proxy from packaging/container, started by compose as docs/howto/run-in-containers.md says.

The image is built without a registry, from Debian as tests/machine/build-images makes it, and without the compiler.
The run directory is in memory and its mounts are shared, as /run of a host with systemd.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import ROOT
from tests.support.docker_tools import docker, inspect
from tests.support.documentation import blocks
from tests.support.installation import PASSWORD, Installation, until

pytestmark = [pytest.mark.docker, pytest.mark.root]

PAGE = ROOT / "docs/howto/run-in-containers.md"
IMAGE = "dispatcher-test/dispatcher"
PROXY_UID = 1900065536
APPS = """
[defaults]
provider = "docker"
idle_timeout = false
[apps.probe]
health = "/"
memory = "64M"
[apps.probe.secrets]
token = "/etc/dispatcher/token"
[apps.probe.docker]
image = "dispatcher-test/probe"
command = ["python3", "/probe.py", "--unix", "{{socket}}"]
[apps.port]
health = "/"
network = "private"
[apps.port.docker]
image = "dispatcher-test/probe"
port = 8080
command = ["python3", "/probe.py", "--tcp", "0.0.0.0:{{port}}"]
"""


class Containers(Installation):
    """An installation whose daemons are the two services of the compose file."""

    scheme = "https"

    def __init__(self, base: Path) -> None:
        tls = 'tls_cert = "/etc/dispatcher/tls/cert.pem"\ntls_key = "/etc/dispatcher/tls/key.pem"'
        super().__init__(base, APPS, proxy=tls)
        self.etc = base / "etc"
        (prepare,) = (one.text for one in blocks(PAGE, "sh") if one.mark.startswith("run by"))
        script = prepare.replace("/etc/dispatcher", str(self.etc))
        subprocess.run(["sh", "-ec", script], cwd=ROOT, check=True, capture_output=True, timeout=60)
        self.config = self.config.rename(self.etc / "dispatcher.toml")
        (self.etc / "token").write_text("a secret of the app")
        (self.etc / "token").chmod(0o600)
        run = base / "run"
        run.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", run], check=True)
        subprocess.run(["mount", "--make-shared", run], check=True)
        self.project = base.name
        self.variables = {
            "DISPATCHER_IMAGE": IMAGE, "DISPATCHER_ETC": str(self.etc),
            "DISPATCHER_STATE": str(base / "state"), "DISPATCHER_RUN": str(run),
        }  # fmt: skip

    def compose(self, *arguments: str) -> str:
        """Run compose; return its output."""
        file = ROOT / "packaging/container/compose.yml"
        command = ["docker-compose", "--project-name", self.project, "--file", file, *arguments]
        environment = os.environ | self.variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def dispatcher(self, *arguments: str, stdin: str = "") -> str:
        """Run the program in the manager's container."""
        return docker("exec", "-i", self.container("manager")["Id"], "dispatcher", *arguments, input=stdin)

    def container(self, service: str) -> dict:
        labels = {"project": self.project, "service": service}
        filters = [f"--filter=label=com.docker.compose.{key}={value}" for key, value in labels.items()]
        return inspect(docker("ps", "-aq", *filters))

    def logs(self, service: str) -> str:
        command = ["docker", "logs", self.container(service)["Id"]]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr

    def until_up(self) -> None:
        until("the manager answers", lambda: self.admin("GET", "/healthz").status == 200, 60)
        until("the proxy answers", lambda: self.web("GET", "/auth/login", Accept="text/html").status == 200, 60)

    def agent(self, name: str) -> dict:
        handle = self.admin("GET", f"/agents/{name}/runtime").json()["handle"]
        return inspect(handle["name"])

    def ask(self, cookie: str, path: str) -> str:
        def answered():
            answer = self.web("GET", path, Cookie=cookie, Accept="*/*")
            return answer.body.decode() if answer.status == 200 else None

        return until(f"the app answers {path}", answered, 60)

    def close(self) -> None:
        try:
            if (self.base / "run/manager.sock").exists():
                for row in self.admin("GET", "/agents").json()["agents"]:
                    self.admin("DELETE", f"/agents/{quote(row['name'])}?wait=30")
        finally:
            sys.stderr.writelines(self.logs(service) for service in ("manager", "proxy"))
            self.compose("down")
            for mount in ("run/a", "run"):
                subprocess.run(["umount", self.base / mount], check=False, capture_output=True)
            shutil.rmtree(self.base)


@pytest.fixture(scope="module")
def image() -> dict:
    subprocess.run([ROOT / "tests/machine/build-images", "dispatcher"], check=True, timeout=600)
    return inspect(IMAGE)


@pytest.fixture(scope="module")
def site(image):
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    with Containers(base) as site:
        site.compose("up", "-d")
        site.until_up()
        yield site


@pytest.fixture
def user() -> str:
    """A name that is new, also where a test is repeated."""
    return f"user{secrets.token_hex(3)}"


def test_the_image_has_what_runs_and_nothing_that_builds(image):
    config = image["Config"]
    assert config["User"] == "dispatcher-proxy"
    assert config["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
    labels = {name.rpartition(".")[2]: text for name, text in config["Labels"].items()}
    assert labels["licenses"] == "Apache-2.0"
    version = docker("run", "--rm", "--network", "none", IMAGE, "--version")
    assert version.split()[-1] == labels["version"]
    script = "command -v cc gcc make; find / -xdev \\( -name '*.deb' -o -name .git -o -path /src \\); pip check"
    found = docker("run", "--rm", "--network", "none", "--entrypoint", "sh", IMAGE, "-c", script)
    assert found == "No broken requirements found."


def test_the_proxy_has_no_privilege_and_only_the_sockets(site):
    container = site.container("proxy")
    assert {one["Destination"] for one in container["Mounts"]} == {"/etc/dispatcher", str(site.base / "run")}
    status = Path(f"/proc/{container['State']['Pid']}/status").read_text()
    facts = dict(line.split(":\t", 1) for line in status.splitlines())
    assert facts["Uid"].split() == [str(PROXY_UID)] * 4
    assert {int(facts[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")


def test_both_health_checks_tell_what_answers(site):
    for service in ("manager", "proxy"):
        docker("exec", site.container(service)["Id"], "healthcheck")
    for user in ("root", "dispatcher-proxy"):
        alone = ["run", "--rm", "--network", "none", "--user", user, "--entrypoint", "sh", IMAGE]
        assert docker(*alone, "-c", "healthcheck 2> /dev/null; echo $?") == "1", "nothing runs there"


def test_agents_are_used_suspended_woken_and_survive_a_new_container_of_the_manager(site, user):
    site.dispatcher("add", user, "--app", "probe", "--password-stdin", stdin=PASSWORD + "\n")
    cookie = site.login(user)
    identity = site.ask(cookie, "/id")
    assert site.ask(cookie, "/read?path=/run/secrets/token") == "a secret of the app"
    pid = site.agent(user)["State"]["Pid"]
    site.dispatcher("suspend", user)
    until("it is suspended", lambda: site.agent(user)["State"]["Paused"])
    assert site.ask(cookie, "/id") == identity
    assert user in site.dispatcher("memory-usage")

    before = site.container("manager")["Id"]
    site.compose("up", "-d", "--force-recreate", "--no-deps", "manager")
    assert site.ask(cookie, "/id") == identity, "served while the manager starts"
    until("the new manager answers", lambda: site.admin("GET", "/healthz").status == 200, 60)
    assert site.container("manager")["Id"] != before
    until("it is adopted", lambda: site.admin("GET", f"/agents/{user}/state").json()["state"] == "running")
    assert site.agent(user)["State"]["Pid"] == pid
    assert site.ask(cookie, "/id") == identity
    assert site.login(user)


def test_a_private_network_with_a_port_reaches_the_proxy_and_not_the_host(site, user):
    site.dispatcher("add", user, "--app", "port", "--password-stdin", stdin=PASSWORD + "\n")
    cookie = site.login(user)
    assert "uid=" in site.ask(cookie, "/id")
    (network,) = site.agent(user)["NetworkSettings"]["Networks"].values()
    with socket.create_server((network["Gateway"], 0)) as ours:
        path = f"/connect?to=tcp:{network['Gateway']}:{ours.getsockname()[1]}"
        assert site.web("GET", path, Cookie=cookie, Accept="*/*").body == b"ECONNREFUSED"
    findings = site.dispatcher("providers", "check", "docker")
    assert "cloud's metadata" not in findings
    assert "tracked connections" not in findings


def test_the_file_system_of_agents_sockets_is_bounded_and_seen_by_all(site):
    sizes = {
        docker("exec", site.container(service)["Id"], "stat", "-f", "-c", "%b %S", site.base / "run/a")
        for service in ("manager", "proxy")
    }
    host = os.statvfs(site.base / "run/a")
    assert sizes == {f"{host.f_blocks} {host.f_frsize}"}
    assert host.f_blocks * host.f_frsize == 16 << 20


def test_the_command_in_the_managers_container_reloads_the_proxy(site):
    assert "the proxy reloads the configuration" in site.dispatcher("reload")
    until("it has reloaded", lambda: "the new configuration is in use" in site.logs("proxy"))


def test_only_agents_in_containers_are_possible(image):
    table = "".join(f'[apps.{name}]\nprovider = "{name}"\n' for name in ("subprocess", "libvirt"))
    script = "dispatcher --config /dev/stdin config check 2>&1 || true"
    command = ["run", "--rm", "-i", "--network", "none", "--entrypoint", "sh", IMAGE, "-c", script]
    said = docker(*command, input=table)
    for name in ("subprocess", "libvirt"):
        assert f"apps.{name}.provider: there is no plugin '{name}': installed are: docker" in said


def test_both_stop_at_once_and_agents_and_sessions_are_there_afterwards(site, user):
    site.add(user, "probe")
    cookie = site.login(user)
    identity = site.ask(cookie, "/id")
    agent = site.agent(user)
    site.compose("stop")
    assert [site.container(service)["State"]["ExitCode"] for service in ("manager", "proxy")] == [0, 0]
    assert inspect(agent["Id"])["State"]["Pid"] == agent["State"]["Pid"]
    site.compose("start")
    site.until_up()
    until("it is adopted", lambda: site.admin("GET", f"/agents/{user}/state").json()["state"] == "running")
    assert site.ask(cookie, "/id") == identity
