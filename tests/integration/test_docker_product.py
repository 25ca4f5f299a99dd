"""Docker agents in the whole product: one line moves an app to containers, examples run, the engine's end shows."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

from dispatcher.testing import PROBE
from tests.support.docker_tools import ROOT, docker, images, inspect, leftovers, remove_all
from tests.support.installation import Installation, until

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.bubblewrap, pytest.mark.slow]

BOTH = f'''
[apps.probe]
provider = "subprocess"
health = "/"
[apps.probe.subprocess]
command = ["{sys.executable}", "{PROBE}", "--unix", "{{{{socket}}}}"]
read_only = ["{PROBE.parent}"]
[apps.probe.docker]
image = "dispatcher-test/probe"
command = ["python3", "/probe.py", "--unix", "{{{{socket}}}}"]
'''


@pytest.fixture
def site():
    images()
    with contextlib.ExitStack() as stack:

        def make(apps: str) -> Installation:
            base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
            base.chmod(0o755)
            site = stack.enter_context(Installation(base, apps))
            site.start("manager")
            site.start("proxy")
            return site

        yield make


def ask(site, cookie, path, seconds=30):
    def answered():
        answer = site.web("GET", path, Cookie=cookie, Accept="*/*")
        return answer.body if answer.status == 200 else None

    return until(f"the app answers {path}", answered, seconds)


def installation_of(site):
    """Return what this installation, and no other one on the same engine, calls itself."""
    return site.admin("GET", "/agents/alice/runtime").json()["handle"]["name"].split("-")[1]


def containers_of(site):
    """Return the containers of alice, of this installation's one."""
    labels = {"agent": "alice", "installation": installation_of(site)}
    filters = [word for key, value in labels.items() for word in ("--filter", f"label=dispatcher.{key}={value}")]
    return docker("ps", "-a", "--format", "{{.Names}}", *filters).split()


def test_one_line_moves_an_app_into_containers_and_back(site):
    site = site(BOTH)
    site.add("alice")
    cookie = site.login("alice")
    environment = dict(entry.split("=", 1) for entry in ask(site, cookie, "/env").decode().split("\0") if entry)
    origin = f"http://127.0.0.1:{site.port}"
    path = f"/write?path={quote(environment['DISPATCHER_DATA'] + '/note')}"
    assert site.web("POST", path, "mine", Cookie=cookie, Origin=origin).status == 200
    for provider, other in (("docker", "subprocess"), ("subprocess", "docker")):
        site.config.write_text(
            site.config.read_text().replace(f'provider = "{other}"', f'provider = "{provider}"')
        )
        assert site.admin("POST", "/reload").status == 200
        answer = site.admin("POST", "/agents/alice/restart?wait=60")
        assert answer.status in {200, 202}, answer.body
        until("it is moved", lambda: site.admin("GET", "/agents/alice").json()["provider"] == provider)
        environment = dict(
            entry.split("=", 1) for entry in ask(site, cookie, "/env").decode().split("\0") if entry
        )
        assert ask(site, cookie, f"/read?path={quote(environment['DISPATCHER_DATA'] + '/note')}") == b'"mine"'
        assert bool(containers_of(site)) == (provider == "docker")
        if provider == "docker":  # limits by default, as the app is told them
            host = inspect(containers_of(site)[0])["HostConfig"]
            assert host["PidsLimit"] == int(environment["DISPATCHER_PIDS_LIMIT"]) == 4096
            assert host["Memory"] == host["MemorySwap"] == int(environment["DISPATCHER_MEMORY_LIMIT"]) > 0


def test_files_by_a_port_as_the_example_says(site):
    text = (ROOT / "examples/docker-files.toml").read_text()
    assert 'image = "busybox:1.36"' in text
    text = text.replace("busybox:1.36", "dispatcher-test/busybox").replace("{", "{{").replace("}", "}}")
    site = site(text)
    site.add("alice")
    cookie = site.login("alice")
    until("it runs", lambda: site.admin("GET", "/agents/alice/state").json()["state"] == "running", 30)
    from dispatcher.plugin import names

    data = site.base / "state/agents" / names.key("alice") / "data"
    (data / "hello.txt").write_text("hello\n")
    (data / "hello.txt").chmod(0o644)
    assert ask(site, cookie, "/hello.txt") == b"hello\n"


def test_a_killed_container_comes_back_and_why_is_told(site):
    site = site(BOTH.replace('provider = "subprocess"', 'provider = "docker"'))
    site.add("alice")
    cookie = site.login("alice")
    ask(site, cookie, "/id")
    (name,) = containers_of(site)
    docker("kill", name)
    until(
        "it died and came back",
        lambda: any(
            "signal 9" in event["detail"] for event in site.admin("GET", "/agents/alice/events").json()["events"]
        ),
        10,
    )
    assert b"uid=" in ask(site, cookie, "/id", 15)


def test_removed_with_its_container_and_secrets(site):
    site = site(BOTH.replace('provider = "subprocess"', 'provider = "docker"'))
    site.add("alice")
    cookie = site.login("alice")
    ask(site, cookie, "/id")
    assert len(containers_of(site)) == 1
    installation = installation_of(site)
    assert site.admin("DELETE", "/agents/alice?wait=30").status == 204
    assert not leftovers(installation)
    remove_all(installation)


def test_a_restarted_manager_adopts_containers(site):
    site = site(BOTH.replace('provider = "subprocess"', 'provider = "docker"'))
    site.add("alice")
    cookie = site.login("alice")
    before = ask(site, cookie, "/id")
    site.kill("manager")
    assert ask(site, cookie, "/id") == before, "served meanwhile"
    site.start("manager")
    until("it is adopted", lambda: site.admin("GET", "/agents/alice/state").json()["state"] == "running")
    assert ask(site, cookie, "/id") == before


def test_an_app_on_the_loopback_interface_is_told_where_it_listens_and_what_to_change(site):
    site = site(
        '[apps.probe]\nprovider = "docker"\nnetwork = "private"\nhealth = "/"\nstart_timeout = "4s"\n'
        '[apps.probe.docker]\nimage = "dispatcher-test/probe"\nport = 8080\n'
        'command = ["python3", "/probe.py", "--tcp", "127.0.0.1:{{port}}"]\n'
    )
    site.add("alice")

    def reason():
        events = site.admin("GET", "/agents/alice/events").json()["events"]
        return next((event["detail"] for event in events if "127.0.0.1:8080" in event["detail"]), "")

    site.admin("PUT", "/agents/alice/state", {"state": "running"})
    assert "at 0.0.0.0 where it has a network of its own" in until("the start fails", reason, 30)
